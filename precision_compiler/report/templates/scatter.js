// Share of error against share of time, on logarithmic axes with a gutter for zero.

const MARGIN = { top: 12, right: 16, bottom: 40, left: 78 };
const GUTTER = 40;
const SMALLEST = 1e-6;

function drawScatter(place, report) {
  const size = { width: Math.max(place.clientWidth, 280), height: 380 };
  const shown = report.sites.filter((site) => site.matches && (site.timeShare || site.choice.variance_share));
  const x = logScale(shown.map((site) => site.timeShare), MARGIN.left, size.width - MARGIN.right);
  const y = logScale(shown.map((site) => site.choice.variance_share), size.height - MARGIN.bottom, MARGIN.top);
  const label = draw("text", { class: "label", "aria-hidden": "true" });
  const points = inOrder(shown).map((site) => point(site, x, y));
  const svg = draw("svg", { ...size, role: "group", "aria-labelledby": "scatter-title", "aria-describedby": "scatter-help" },
    axes(x, y, size), draw("g", { class: "points" }, ...points), label);
  if (points.length) points[0].setAttribute("tabindex", 0);
  place.replaceChildren(svg);
  byId("scatter-help").textContent = scatterHelp(report, shown);
}

function scatterHelp(report, shown) {
  const absent = report.sites.filter((site) => site.matches).length - shown.length;
  return "Circle: 32 bits, square: 16, triangle: 8, diamond: fewer. Arrow keys go from the largest "
    + "share of error down, Enter explains a site."
    + (absent ? ` ${plural(absent, "site")} with neither time nor error ${absent === 1 ? "is" : "are"} not drawn.` : "");
}

function inOrder(sites) {
  return [...sites].sort((a, b) => b.choice.variance_share - a.choice.variance_share);
}

function logScale(values, zero, end) {
  const positive = values.filter((value) => value > 0).map(Math.log10);
  const low = Math.max(Math.floor(positive.reduce((a, b) => Math.min(a, b), -1)), Math.log10(SMALLEST));
  const high = Math.max(Math.ceil(positive.reduce((a, b) => Math.max(a, b), -1)), low + 1);
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
      draw("text", { x: x.at(tick), y: height - 24, "text-anchor": "middle" }, tickText(tick)));
  }
  for (const tick of y.ticks) {
    group.append(draw("line", { x1: x.zero, x2: x.end, y1: y.at(tick), y2: y.at(tick) }),
      draw("text", { x: MARGIN.left - 8, y: y.at(tick) + 4, "text-anchor": "end" }, tickText(tick)));
  }
  group.append(draw("text", { x: (x.zero + width) / 2, y: height - 6, "text-anchor": "middle" }, "share of time"),
    draw("text", { transform: `translate(12 ${height / 2}) rotate(-90)`, "text-anchor": "middle" }, "share of error variance"));
  return group;
}

function tickText(share) {
  return share === 0 ? "0" : `${Number((100 * share).toPrecision(1))}%`;
}

function point(site, x, y) {
  const { format, variance_share: error } = site.choice;
  site.point = draw("path", {
    d: shape(site.bits), transform: `translate(${x.at(site.timeShare).toFixed(1)} ${y.at(error).toFixed(1)})`,
    tabindex: -1, role: "button", "data-site": site.position, "data-format": format,
    "aria-label": `${site.name}: ${format}, ${percent(site.timeShare)} of time, ${percent(error)} of error`,
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
  label.textContent = target ? target.getAttribute("aria-label") : "";
  if (!target) return;
  const { e: left, f: top } = target.transform.baseVal.consolidate().matrix;
  const width = svg.clientWidth;
  const half = Math.min(label.getComputedTextLength() / 2, width / 2);
  label.setAttribute("x", Math.min(Math.max(left, half + 4), width - half - 4));
  label.setAttribute("y", top < 36 ? top + 22 : top - 12);
}

function onPointKey(event, svg, choose) {
  const current = event.target.closest("path[data-site]");
  if (!current) return;
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    choose(current);
    return;
  }
  const steps = { ArrowRight: "nextElementSibling", ArrowDown: "nextElementSibling", ArrowLeft: "previousElementSibling", ArrowUp: "previousElementSibling" };
  const next = Object.hasOwn(steps, event.key) ? current[steps[event.key]] : null;
  if (!next) return;
  event.preventDefault();
  current.setAttribute("tabindex", -1);
  next.setAttribute("tabindex", 0);
  next.focus();
}
