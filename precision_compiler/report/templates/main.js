// Puts the page together: data, selection, permalinks, search, colours.

function readReport() {
  const [plan, view] = [readJson("plan-data"), readJson("view-data")];
  const flagsOf = Map.groupBy(plan.flags, (flag) => flag.site);
  const seconds = sum(Object.values(plan.sites), (choice) => choice.seconds) || 1;
  const sites = view.names.map((name, position) => {
    const choice = plan.sites[name];
    return {
      name, position, choice, matches: true, selected: false, bits: view.formats[choice.format],
      timeShare: choice.seconds / seconds, flags: flagsOf.get(name) ?? [],
    };
  });
  const byName = new Map(sites.map((site) => [site.name, site]));
  const nodesOf = Map.groupBy(plan.nodes, (node) => node.site);
  return { plan, view, sites, byName, nodesOf, cameFrom: null };
}

function mark(site, selected) {
  site.selected = selected;
  site.button.setAttribute("aria-current", selected);
  site.point?.classList.toggle("selected", selected);
}

function select(report, site) {
  clear(report);
  mark(site, true);
  moveTabStop(byId("grid"), site.button);
  const close = make("button", { type: "button", id: "close" }, "Close");
  close.addEventListener("click", () => leave(report));
  const link = { href: permalink(site.name), title: "link to this site" };
  showPanel(make("a", link, site.name), close, ...explanation(site, report));
}

function showPanel(title, ...content) {
  byId("panel-title").replaceChildren(title);
  byId("explanation").replaceChildren(...content);
  byId("panel").classList.add("open");
  byId("panel").scrollTop = 0;
}

function clear(report) {
  for (const site of report.sites) if (site.selected) mark(site, false);
}

// Closes the panel and gives the focus back to where it was opened from.
function leave(report) {
  const opened = report.sites.find((site) => site.selected);
  clear(report);
  const hint = "Choose a cell of the grid or a point of the chart.";
  showPanel("No site selected", make("p", { class: "quiet" }, hint));
  byId("panel").classList.remove("open");
  history.replaceState(null, "", location.pathname + location.search);
  const from = report.cameFrom?.isConnected ? report.cameFrom : opened?.button;
  from?.focus();
}

// A click by keyboard has no coordinates: then the focus follows into the panel.
function choose(report, target, byKeyboard) {
  const site = report.sites[Number(target.dataset.site)];
  report.cameFrom = target;
  select(report, site);
  target.scrollIntoView({ block: "nearest", inline: "nearest" });
  history.replaceState(null, "", permalink(site.name));
  if (byKeyboard) byId("panel-title").focus();
}

function openFromAddress(report) {
  if (!location.hash.startsWith("#site=")) return;
  const name = decoded(location.hash.slice("#site=".length));
  const site = report.byName.get(name);
  if (!site) {
    showPanel("No such site", make("p", { class: "bad" }, `The plan has no site ${name}.`));
    return;
  }
  if (!site.matches) search(report, "");
  report.cameFrom = site.button;
  select(report, site);
  site.button.scrollIntoView({ block: "center", inline: "nearest" });
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch (error) {
    if (error instanceof URIError) return text;
    throw error;
  }
}

function search(report, pattern) {
  byId("glob").value = pattern;
  const fits = pattern ? globMatcher(pattern) : () => true;
  for (const site of report.sites) site.matches = fits(site.name);
  const found = report.sites.filter((site) => site.matches).length;
  const all = plural(report.sites.length, "site");
  byId("matches").textContent = pattern ? `${found} of ${all}` : all;
  filterGrid(byId("grid"), report.sites);
  drawScatter(byId("plot"), report);
}

function drawLegend(report) {
  const counts = Map.groupBy(report.sites, (site) => site.choice.format);
  byId("legend").append(...Object.keys(report.view.formats).map((format) =>
    make("li", {}, chip(format), ` ${counts.get(format).length}`)));
}

function showTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  byId("theme").setAttribute("aria-pressed", dark);
}

function listenToTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  showTheme(system.matches);
  system.addEventListener("change", () => showTheme(system.matches));
  byId("theme").addEventListener("click", () =>
    showTheme(document.documentElement.dataset.theme !== "dark"));
}

function listenToGrid(report) {
  const grid = byId("grid");
  grid.addEventListener("keydown", (event) => onGridKey(event, grid));
  grid.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) choose(report, button, event.detail === 0);
  });
}

function listenToPlot(report) {
  const plot = byId("plot");
  const show = (event) => labelPoint(plot.firstChild, event.target.closest("path[data-site]"));
  for (const kind of ["mouseover", "focusin"]) plot.addEventListener(kind, show);
  plot.addEventListener("mouseleave", () => labelPoint(plot.firstChild, null));
  plot.addEventListener("keydown", (event) =>
    onPointKey(event, (target) => choose(report, target, true)));
  plot.addEventListener("click", (event) => {
    const target = event.target.closest("path[data-site]");
    if (target) choose(report, target, false);
  });
  new ResizeObserver(() => {
    if (plot.firstChild.clientWidth !== plot.clientWidth) drawScatter(plot, report);
  }).observe(plot);
}

function listenToFlags(report) {
  const groups = Map.groupBy(report.plan.flags, (flag) => flag.name);
  for (const details of document.querySelectorAll("details[data-flag]")) {
    const fill = () => fillFlags(details, groups.get(details.dataset.flag), report);
    details.addEventListener("toggle", fill, { once: true });
  }
}

function listenToPage(report) {
  byId("search").addEventListener("submit", (event) => event.preventDefault());
  byId("glob").addEventListener("input", (event) => search(report, event.target.value.trim()));
  addEventListener("hashchange", () => openFromAddress(report));
  byId("panel").addEventListener("keydown", (event) => {
    if (event.key === "Escape") leave(report);
  });
}

function start() {
  const report = readReport();
  listenToTheme();
  drawLegend(report);
  drawGrid(byId("grid"), report);
  drawScatter(byId("plot"), report);
  listenToGrid(report);
  listenToPlot(report);
  listenToFlags(report);
  listenToPage(report);
  openFromAddress(report);
}

start();
