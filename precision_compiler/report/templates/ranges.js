// How large a tensor's elements are, against what each format holds.

const BAR = { width: 300, height: 64, row: 13, label: 56 };

function histogram(range, site, report) {
  const held = (format) => report.view.limits[format] !== null;  // null: a scale for every block
  const formats = Object.keys(site.choice.options).filter(held);
  const reach = formats.map((format) => reachOf(format, range, report));
  const highest = range.lowest + range.shares.length;
  const low = Math.max(range.lowest - 2, -150);
  const high = Math.min(highest + 6, 130);
  const x = (exponent) => BAR.label
    + (Math.min(Math.max(exponent, low), high) - low) / (high - low) * (BAR.width - BAR.label);
  const most = Math.max(...range.shares);
  const bars = range.shares.map((share, index) => draw("rect", {
    x: x(range.lowest + index), width: Math.max(x(range.lowest + index + 1) - x(range.lowest + index) - 0.5, 0.5),
    y: BAR.height - share / most * (BAR.height - 4), height: share / most * (BAR.height - 4),
  }));
  const rows = reach.flatMap(([from, to], index) => {
    const y = BAR.height + 10 + index * BAR.row;
    const chosen = formats[index] === site.choice.format;
    return [
      draw("line", { class: chosen ? "ours" : null, x1: x(from), x2: x(to), y1: y, y2: y }),
      axisText(formats[index], { x: BAR.label - 6, y: y + 4, "text-anchor": "end" }),
    ];
  });
  const height = BAR.height + 14 + formats.length * BAR.row;
  const says = `${range.tensor}: magnitudes from 2^${range.lowest} to ${digits(range.amax)}`;
  return make("figure", { class: "range" },
    make("figcaption", {}, says),
    draw("svg", { viewBox: `0 0 ${BAR.width} ${height}`, role: "img", "aria-label": says },
      draw("g", { class: "bars" }, ...bars), draw("g", { class: "reach" }, ...rows)));
}

// Binary exponents of the smallest and the largest number that a format holds of this tensor.
function reachOf(format, range, report) {
  const [least, most, scaled] = report.view.limits[format];
  const shift = scaled && range.amax ? Math.log2(range.amax) - most : 0;
  return [least + shift, most + shift];
}
