// Elements and numbers. Data becomes text nodes and attributes, never markup.

const SVG = "http://www.w3.org/2000/svg";

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function make(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function draw(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function byId(id) {
  return document.getElementById(id);
}

function readJson(id) {
  return JSON.parse(byId(id).textContent);
}

function digits(value, count = 3) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(count - 1);
  return String(Number(value.toPrecision(count)));
}

function milliseconds(seconds) {
  return digits(seconds * 1e3);
}

function percent(share) {
  if (share === 0) return "0%";
  return share < 1e-4 ? "<0.01%" : `${Number((100 * share).toPrecision(share < 0.1 ? 2 : 3))}%`;
}

function plural(count, word) {
  return `${count} ${word}${count === 1 ? "" : "s"}`;
}

function permalink(name) {
  return `#site=${encodeURIComponent(name)}`;
}

function chip(format) {
  return make("span", { class: "chip", "data-format": format }, format);
}

// `*` is any text, `?` any character; a pattern without either is looked for anywhere in the name.
function globMatcher(pattern) {
  const wild = /[*?]/.test(pattern);
  const escaped = pattern.replace(/[.+^${}()|[\]\\]/g, "\\$&");
  const source = escaped.replace(/\*/g, ".*").replace(/\?/g, ".");
  const expression = new RegExp(wild ? `^${source}$` : source, "s");
  return (name) => expression.test(name);
}
