// The panel: everything the plan says of one site.

const SITE_FIELDS = new Set([
  "kind", "role", "op", "signature", "shape", "format", "reason", "seconds", "error",
  "variance_share", "options", "ranges",
]);

function explanation(site, report) {
  return [
    make("p", { class: "reason" }, chip(site.choice.format), " ", site.choice.reason),
    siteFacts(site, report),
    make("h3", {}, "Options"),
    optionsTable(site),
    ...site.choice.ranges.map((range) => histogram(range, site, report)),
    ...flagList(site.flags),
    ...nodeTable(report.nodesOf.get(site.name) ?? []),
  ];
}

function siteFacts(site, report) {
  const { choice } = site;
  const alone = choice.options[choice.format];
  const raised = report.plan.verification?.raised?.[site.name]?.[choice.format];
  const facts = [
    ["time", `${milliseconds(choice.seconds)} ms, ${percent(site.timeShare)} of all sites`],
    ["error alone", alone ? digits(alone.error) : "unknown"],
    ["error in plan", `${digits(choice.error)} between these neighbours`],
    ["variance share", `${percent(choice.variance_share)} of the plan's error`],
    ["role", `${choice.role} (${choice.kind})`],
    ["operation", choice.signature || choice.op],
    ["shape", choice.shape.join(" x ") || "scalar"],
  ];
  if (raised !== undefined) {
    facts.push(["raised", `variance times ${digits(raised)} after verification`]);
  }
  for (const [name, value] of Object.entries(choice)) {
    if (!SITE_FIELDS.has(name)) facts.push([name.replaceAll("_", " "), plainText(value)]);
  }
  return make("dl", { class: "facts" }, ...facts.map(([name, text]) => fact(name, text)));
}

function fact(name, text) {
  return make("div", {}, make("dt", {}, name), make("dd", {}, text));
}

function plainText(value) {
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

function optionsTable(site) {
  const heads = ["format", "ms", "error alone", "verdict"];
  const rows = Object.entries(site.choice.options).map(([format, option]) =>
    optionRow(format, option, site.choice));
  return make("table", { class: "options" },
    make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))),
    make("tbody", {}, ...rows));
}

function optionRow(format, option, choice) {
  const chosen = format === choice.format;
  const vetoed = option.veto !== null;
  const verdict = vetoed ? `ruled out: ${option.veto}` : saving(option, choice);
  return make("tr", { class: chosen ? "ours" : vetoed ? "veto" : null },
    make("th", { scope: "row" }, chip(format)),
    make("td", { class: "number" }, milliseconds(option.seconds)),
    make("td", { class: "number" }, digits(option.error)),
    make("td", {}, chosen ? "chosen" : verdict));
}

function saving(option, choice) {
  const difference = option.seconds - choice.seconds;
  if (difference === 0) return "same time here";
  return `${milliseconds(Math.abs(difference))} ms ${difference < 0 ? "faster" : "slower"} here`;
}

function flagList(flags) {
  if (!flags.length) return [];
  const items = flags.map((flag) => make("li", { class: flag.veto ? "veto" : null },
    make("b", {}, flag.name), flag.format ? ` in ${flag.format}` : "",
    flag.veto ? " (veto): " : ": ", flag.sentence));
  return [make("h3", {}, "Flags"), make("ul", { class: "flags" }, ...items)];
}

function nodeTable(nodes) {
  if (!nodes.length) return [];
  const rows = nodes.map((node) => make("tr", {},
    make("th", { scope: "row" }, node.name),
    make("td", {}, node.compute_format),
    make("td", {}, node.storage_format)));
  const heads = ["node", "computes in", "stored in"];
  return [make("h3", {}, "Nodes"), make("table", {},
    make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))),
    make("tbody", {}, ...rows))];
}

// Flags of one name under their heading, made when it is opened first.
function fillFlags(details, flags, report, limit = 500) {
  const items = flags.slice(0, limit).map((flag) => make("li", {},
    flagPlace(flag, report),
    flag.format ? make("span", {}, " ", chip(flag.format)) : null,
    flag.veto ? make("b", {}, " veto") : null, ` ${flag.sentence}`));
  const left = flags.length - items.length;
  if (left) items.push(make("li", {}, `and ${left} more, in the plan file`));
  details.append(make("ul", { class: "flags" }, ...items));
  details.querySelector(".example").hidden = true;
}

// Flags may be about the plan, or about a node that is no site.
function flagPlace(flag, report) {
  if (!report.byName.has(flag.site)) return flag.site || "the plan";
  return make("a", { href: permalink(flag.site) }, flag.site);
}
