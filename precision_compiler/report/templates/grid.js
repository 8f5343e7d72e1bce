// The grid: a row for each module, a column for each direction, a button for each site.

function drawGrid(table, report) {
  for (const section of report.view.sections) table.append(sectionBody(section, report));
  const first = table.querySelector("tbody button");
  if (first) first.tabIndex = 0;
}

function sectionBody(section, report) {
  const sites = section.rows.flatMap(([, cells]) => Object.values(cells).flat())
    .map((position) => report.sites[position]);
  const time = sum(sites, (site) => site.timeShare);
  const error = sum(sites, (site) => site.choice.variance_share);
  const count = plural(sites.length, "site");
  const notes = `${count}, ${percent(time)} of time, ${percent(error)} of error`;
  const heading = make("tr", { class: "section" },
    make("th", { scope: "rowgroup", colspan: report.view.columns.length + 1 },
      make("span", {}, section.name, make("small", {}, notes))));
  return make("tbody", {}, heading, ...section.rows.map((row) => gridRow(row, report)));
}

function sum(items, value) {
  return items.reduce((total, item) => total + value(item), 0);
}

function gridRow([module, cells], report) {
  const label = module || "(itself)";
  const buttons = (column) =>
    (cells[column] ?? []).map((position) => siteButton(report.sites[position]));
  return make("tr", {}, make("th", { scope: "row", title: label }, label),
    ...report.view.columns.map((column) => make("td", {}, ...buttons(column))));
}

function siteButton(site) {
  const flagged = site.flags.length ? `, ${plural(site.flags.length, "flag")}` : "";
  const { format } = site.choice;
  site.button = make("button", {
    type: "button", tabindex: -1, title: site.name, class: flagged ? "flagged" : null,
    "data-site": site.position, "data-format": format,
    "aria-label": `${site.name}: ${format}${flagged}`,
  }, format);
  return site.button;
}

function filterGrid(table, sites) {
  for (const site of sites) site.button.hidden = !site.matches;
  for (const body of table.tBodies) {
    const rows = [...body.rows].slice(1);
    for (const row of rows) row.hidden = !row.querySelector("button:not([hidden])");
    body.hidden = rows.every((row) => row.hidden);
  }
  const shown = shownButtons(table);
  if (shown.length && !shown.some((button) => button.tabIndex === 0)) moveTabStop(table, shown[0]);
}

function shownButtons(table) {
  return [...table.querySelectorAll("button:not([hidden])")];
}

// One cell at a time is a tab stop.
function moveTabStop(table, button) {
  for (const other of table.querySelectorAll("button[tabindex='0']")) other.tabIndex = -1;
  button.tabIndex = 0;
}

function onGridKey(event, table) {
  const current = event.target.closest("button");
  const next = current && neighbour(shownButtons(table), current, event.key);
  if (!next) return;
  event.preventDefault();
  moveTabStop(table, next);
  next.focus();
}

function neighbour(buttons, current, key) {
  const place = buttons.indexOf(current);
  switch (key) {
    case "ArrowRight": return buttons[place + 1];
    case "ArrowLeft": return buttons[place - 1];
    case "ArrowDown": return buttons.slice(place + 1).find((button) => isBelow(button, current));
    case "ArrowUp": return buttons.slice(0, place).findLast((button) => isBelow(current, button));
    case "Home": return buttons[0];
    case "End": return buttons.at(-1);
    default: return undefined;
  }
}

function isBelow(lower, upper) {
  const [cell, other] = [lower.parentElement, upper.parentElement];
  return cell.cellIndex === other.cellIndex && cell.parentElement !== other.parentElement;
}
