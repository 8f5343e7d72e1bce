// Share of error against share of time, on logarithmic axes with a gutter for zero.

const MARGIN = { top: 12, right: 16, bottom: 40, left: 78 };
const GUTTER = 40;
const SMALLEST = 1e-6;

function drawScatter(place, report) {
  const size = { width: Math.max(place.clientWidth, 280), height: 380 };
  const wanted = report.sites.filter((site) => site.matches);
  const shown = wanted.filter((site) => site.timeShare || site.choice.variance_share);
  const [times, errors] = [shown.map((site) => site.timeShare), shown.map(errorShare)];
  const x = logScale(times, MARGIN.left, size.width - MARGIN.right);
  const y = logScale(errors, size.height - MARGIN.bottom, MARGIN.top);
  const label = draw("text", { class: "label", "aria-hidden": "true" });
  const points = inOrder(shown).map((site) => point(site, x, y));
  const named = { "aria-labelledby": "scatter-title", "aria-describedby": "scatter-help" };
  const svg = draw("svg", { ...size, role: "group", ...named },
    axes(x, y, size), draw("g", { class: "points" }, ...points), label);
  if (points.length) points[0].setAttribute("tabindex", 0);
  place.replaceChildren(svg);
  byId("scatter-help").textContent = scatterHelp(wanted.length - shown.length);
}

function errorShare(site) {
  return site.choice.variance_share;
}

function scatterHelp(absent) {
  return "Circle: 32 bits, square: 16, triangle: 8, diamond: fewer. Arrow keys go from the largest "
    + "share of error down, Enter explains a site."
    + (absent ? ` Not drawn: ${plural(absent, "site")} with neither time nor error.` : "");
}

function inOrder(sites) {
  return [...sites].sort((a, b) => errorShare(b) - errorShare(a));
}

function logScale(values, zero, end) {
  const positive = values.filter((value) => value > 0).map(Math.log10);
  const least = positive.reduce((a, b) => Math.min(a, b), 0);
  const most = positive.reduce((a, b) => Math.max(a, b), least);
  const low = Math.max(Math.floor(least), Math.log10(SMALLEST));
  const high = Math.max(Math.ceil(most), low + 1);
  const start = zero + Math.sign(end - zero) * GUTTER;
  const at = (value) => value < 10 ** low
    ? (value > 0 ? start : zero)
    : start + (Math.log10(value) - low) / (high - low) * (end - start);
  const ticks = Array.from({ length: high - low + 1 }, (_, step) => 10 ** (low + step));
  return { at, zero, end, ticks: [0, ...ticks] };
}

function axes(x, y, { width, height }) {
  const group = draw("g", { class: "axes", "aria-hidden": "true" });
  for (const tick of x.ticks) {
    group.append(draw("line", { x1: x.at(tick), x2: x.at(tick), y1: y.zero, y2: y.end }),
      axisText(tickText(tick), { x: x.at(tick), y: height - 24 }));
  }
  for (const tick of y.ticks) {
    group.append(draw("line", { x1: x.zero, x2: x.end, y1: y.at(tick), y2: y.at(tick) }),
      axisText(tickText(tick), { x: MARGIN.left - 8, y: y.at(tick) + 4, "text-anchor": "end" }));
  }
  const upwards = { transform: `translate(12 ${height / 2}) rotate(-90)` };
  group.append(axisText("share of time", { x: (x.zero + width) / 2, y: height - 6 }),
    axisText("share of error variance", upwards));
  return group;
}

function axisText(text, place) {
  return draw("text", { "text-anchor": "middle", ...place }, text);
}

function tickText(share) {
  return share === 0 ? "0" : `${Number((100 * share).toPrecision(1))}%`;
}

function point(site, x, y) {
  const { format, variance_share: error } = site.choice;
  const [left, top] = [x.at(site.timeShare).toFixed(1), y.at(error).toFixed(1)];
  const shares = `${percent(site.timeShare)} of time, ${percent(error)} of error`;
  site.point = draw("path", {
    d: shape(site.bits), transform: `translate(${left} ${top})`,
    tabindex: -1, role: "button", "data-site": site.position, "data-format": format,
    "aria-label": `${site.name}: ${format}, ${shares}`,
  });
  site.point.classList.toggle("selected", site.selected);
  return site.point;
}

function shape(bits) {
  if (bits >= 32) return "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z";
  if (bits === 16) return "M-4.5-4.5h9v9h-9z";
  return bits === 8 ? "M0-5.5l5.5 9.5h-11z" : "M0-6l6 6l-6 6l-6-6z";
}

// The label stays inside the picture: it is anchored at the end that has room.
function labelPoint(svg, target) {
  const label = svg.querySelector(".label");
  label.replaceChildren();
  if (!target) return;
  label.append(...labelLines(target.getAttribute("aria-label")));
  const { e: left, f: top } = target.transform.baseVal.consolidate().matrix;
  const width = svg.clientWidth;
  const half = Math.min(label.getBBox().width / 2, width / 2 - 4);
  const middle = Math.min(Math.max(left, half + 4), width - half - 4);
  for (const line of label.children) line.setAttribute("x", middle);
  label.setAttribute("y", top < 50 ? top + 22 : top - 28);
}

function labelLines(text) {
  const end = text.lastIndexOf(": ");
  return [draw("tspan", {}, text.slice(0, end)), draw("tspan", { dy: 15 }, text.slice(end + 2))];
}

const STEPS = {
  ArrowRight: "nextElementSibling",
  ArrowDown: "nextElementSibling",
  ArrowLeft: "previousElementSibling",
  ArrowUp: "previousElementSibling",
};

function onPointKey(event, choose) {
  const current = event.target.closest("path[data-site]");
  if (!current) return;
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    choose(current);
    return;
  }
  const next = Object.hasOwn(STEPS, event.key) ? current[STEPS[event.key]] : null;
  if (!next) return;
  event.preventDefault();
  current.setAttribute("tabindex", -1);
  next.setAttribute("tabindex", 0);
  next.focus();
}
