"use strict";
// No library, no server: data come as script files that hand over one deflated JSON text each, because
// a page opened from disk may not fetch. Text of the corpus reaches the page as text only.

const PER_PAGE = 50;
const FILTERS = ["q", "min_rate", "max_rate", "min_fuzz", "min_phi", "max_phi", "sort"];
const COLUMNS = ["tokens", "rate", "max", "partner", "phi", "split", "fuzz", "explanation"];
const SPLITS = "-split"; // the order without a choice: what comes apart, then what has a close partner
const waiting = new Map();
const loaded = new Map();
const arms = new Map();
let site, state = {}, shown = [], drawing = 0;

const at = (id) => document.getElementById(id);

try {
  // The book remembers its mode; from disk this may be refused.
  const mode = localStorage.getItem("mode");
  if (mode === "light" || mode === "dark") document.documentElement.dataset.theme = mode;
} catch (refused) { /* the system's mode stands */ }
if (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches) {
  document.documentElement.dataset.theme = "dark";
}

window.METASAE_DATA = async (name, packed) => {
  const bytes = Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  waiting.get(name)(await new Response(stream).json());
};

function load(name) {
  if (!loaded.has(name)) {
    loaded.set(name, new Promise((resolve, reject) => {
      waiting.set(name, resolve);
      const script = document.createElement("script");
      script.src = `data/${name}.js`;
      script.onerror = () => reject(new Error(`data/${name}.js is missing: make the book again`));
      document.head.append(script);
    }));
  }
  return loaded.get(name);
}

function loadArm(name) {
  if (!arms.has(name)) {
    const about = site.arms.find((arm) => arm.name === name);
    const parts = Array.from({ length: about.parts }, (_, i) => load(`${name}/index-${i}`));
    arms.set(name, Promise.all(parts).then((tables) => {
      const arm = { ...about };
      for (const column of COLUMNS) arm[column] = tables.flatMap((table) => table[column]);
      arm.text = arm.tokens.map((tokens, i) =>
        `${i}\n${tokens.join("\n")}\n${arm.explanation[i] ?? ""}`.toLowerCase());
      return arm;
    }));
  }
  return arms.get(name);
}

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return made;
}

function quiet(words) {
  return element("p", { class: "quiet" }, words);
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const text = value !== 0 && Math.abs(value) < 1e-3
    ? value.toExponential(digits - 1) : String(Number(value.toPrecision(digits)));
  return text.replaceAll("-", "−");
}

// A blank, a line's end and a special token can be seen.
function visible(token) {
  return token.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ | $/g, "␣");
}

function address(changes) {
  const next = { ...state, ...changes };
  const hash = new URLSearchParams();
  for (const key of ["arm", "feature", "pair", ...FILTERS, "page"]) {
    const value = next[key];
    const idle = value === undefined || value === "" || (key === "page" && Number(value) === 0)
      || (key === "sort" && value === SPLITS);
    if (!idle) hash.set(key, value);
  }
  return `#${hash}`;
}

// A feature or page is a step that the browser's Back undoes; a letter typed is not.
function go(changes, step = true) {
  const next = address(changes);
  if (step && next !== location.hash) { location.hash = next; return; }
  history.replaceState(null, "", next);
  show();
}

// An arm by its name, by that of a left-out one with the same weights, or by its name without the seed.
function named(wanted) {
  const fits = (name) => name === wanted || name.startsWith(`${wanted}-seed`);
  return site.arms.find((arm) => arm.name === wanted)
    ?? site.arms.find((arm) => [arm.name, ...arm.same].some(fits)) ?? site.arms[0];
}

function readAddress() {
  const hash = new URLSearchParams(location.hash.slice(1));
  const next = { arm: named(hash.get("arm")).name, pair: hash.get("pair") ? "1" : "" };
  for (const key of FILTERS) next[key] = hash.get(key) ?? "";
  next.page = Math.max(0, Math.trunc(Number(hash.get("page"))) || 0);
  const feature = hash.get("feature") ?? "";
  next.feature = /^\d+$/.test(feature) ? Number(feature) : undefined;
  return next;
}

function select(arm) {
  const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  const limit = (key) => (state[key] === "" ? null : Number(state[key]));
  const bounds = [
    ["rate", limit("min_rate"), limit("max_rate")], ["fuzz", limit("min_fuzz"), null],
    ["phi", limit("min_phi"), limit("max_phi")],
  ].filter(([, low, high]) => low !== null || high !== null);
  const inside = (i) => bounds.every(([column, low, high]) => {
    const value = arm[column][i];
    return value !== null && (low === null || value >= low) && (high === null || value <= high);
  });
  const found = [];
  for (let i = 0; i < arm.text.length; i += 1) {
    if (words.every((word) => arm.text[i].includes(word)) && inside(i)) found.push(i);
  }
  const sort = state.sort || SPLITS;
  const by = (column, sign) => (a, b) => {
    const [one, two] = [column[a] ?? sign * Infinity, column[b] ?? sign * Infinity]; // missing: last
    return one === two ? 0 : sign * (one - two);
  };
  const column = arm[sort.replace("-", "")];
  const first = column ? by(column, sort.startsWith("-") ? -1 : 1) : () => 0;
  const then = sort === SPLITS ? by(arm.phi, -1) : () => 0;
  found.sort((a, b) => first(a, b) || then(a, b) || a - b);
  if (words.length === 1 && /^\d+$/.test(words[0])) {
    // A number asks for that feature first, whatever else holds its digits.
    const wanted = Number(words[0]);
    found.sort((a, b) => (b === wanted) - (a === wanted));
  }
  return found;
}

function featureLink(arm, feature, text) {
  const page = arm === state.arm ? state.page : 0;
  return element("a", { href: address({ arm, feature, page, pair: "" }) }, text ?? feature);
}

function drawList(arm) {
  shown = select(arm);
  const pages = Math.max(1, Math.ceil(shown.length / PER_PAGE));
  const page = Math.min(state.page, pages - 1);
  state.page = page;
  at("count").textContent =
    `${shown.length.toLocaleString("en")} of ${arm.text.length.toLocaleString("en")} features of ${arm.name}`
    + ` (${arm.alive.toLocaleString("en")} fire in the scanned text)`;
  at("page").textContent = `Page ${page + 1} of ${pages}`;
  at("previous").disabled = page === 0;
  at("next").disabled = page + 1 >= pages;
  const rows = shown.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map((i) => {
    const numeric = (value) => element("td", { class: "number" }, value);
    const partner = arm.partner[i] === null
      ? element("td", {}, "–")
      : element("td", { class: "number" }, featureLink(arm.other, arm.partner[i]));
    const row = element("tr", i === current() ? { "aria-current": "true" } : {},
      element("th", { scope: "row", class: "number" }, featureLink(arm.name, i)),
      element("td", { class: "token" }, visible(arm.tokens[i][0] ?? "–")),
      numeric(number(arm.rate[i])), numeric(number(arm.max[i])), partner,
      numeric(number(arm.phi[i], 2)), numeric(number(arm.fuzz[i], 2)),
      element("td", {}, arm.explanation[i] ?? "–"));
    return row;
  });
  at("rows").replaceChildren(...rows);
}

// Bars over an axis between two ends, counting `what`. bar: the one of this feature; line: at a share
// of the width.
function histogram(counts, ends, what, { bar = -1, line = null } = {}) {
  const make = (tag, attributes, text = "") => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = text;
    return made;
  };
  const highest = Math.max(...counts, 1);
  const width = 300 / counts.length;
  const total = counts.reduce((sum, count) => sum + count, 0);
  const [low, high] = ends.map((end) => number(end));
  const words = `${total.toLocaleString("en")} ${what} from ${low} to ${high}: ${counts.join(", ")}`;
  const svg = make("svg", { viewBox: "0 0 300 82", role: "img", "aria-label": `Histogram of ${words}` });
  counts.forEach((count, i) => {
    const height = (count / highest) * 55;
    const look = { x: i * width + 0.5, y: 69 - height, width: width - 1, height };
    svg.append(make("rect", i === bar ? { ...look, class: "here" } : look));
  });
  if (line !== null) svg.append(make("line", { x1: 300 * line, x2: 300 * line, y1: 12, y2: 69 }));
  for (const [x, y, anchor, text] of [[0, 9, "start", `up to ${highest.toLocaleString("en")} a bar`],
    [0, 80, "start", low], [150, 80, "middle", what], [300, 80, "end", high]]) {
    svg.append(make("text", { x, y, "text-anchor": anchor }, text));
  }
  return svg;
}

// Where the feature stands among those of its dictionary.
function density(arm, i) {
  const rate = arm.rate[i];
  if (!rate) return [quiet("It does not fire in the scanned text.")];
  const rarer = arm.rate.filter((other) => other > 0 && other < rate).length;
  const [low, high] = arm.rates.map(Math.log);
  const place = high > low ? (Math.log(rate) - low) / (high - low) : 0;
  const bar = Math.min(Math.max(Math.floor(place * arm.density.length), 0), arm.density.length - 1);
  return [
    element("p", {}, `It fires on ${number(100 * rate)}% of the tokens, more often than `
      + `${Math.round((100 * rarer) / arm.alive)}% of the features that fire at all.`),
    histogram(arm.density, arm.rates, "features by firing rate (logarithmic)", { bar }),
  ];
}

function activations(arm, i, { histogram: counts, threshold }) {
  if (!counts.length) return quiet("It does not fire in the contexts.");
  const line = threshold === null ? null : threshold / arm.max[i];
  return histogram(counts, [0, arm.max[i]], "activations above the threshold (line)", { line });
}

function lens([promoted, suppressed]) {
  const list = (label, pairs) => element("div", {}, element("h4", {}, label),
    element("ol", {}, ...pairs.map(([token, value]) => element("li", {},
      element("span", { class: "token" }, visible(token)), " ",
      element("span", { class: "quiet" }, number(value, 2))))));
  return element("div", { class: "lens" }, list("Promotes", promoted), list("Suppresses", suppressed));
}

// [segment, [[start, end, strength 1-9], …]] with positions in characters, not in UTF-16 units.
async function context([segment, spans], largest) {
  const { texts } = await load(`texts-${Math.floor(segment / site.texts)}`);
  const [text, origin] = texts[segment % site.texts];
  const characters = Array.from(text);
  const line = element("p", { class: "context" });
  const strongest = Math.max(...spans.map(([, , strength]) => strength), 0);
  let done = 0;
  for (const [start, end, strength] of spans) {
    line.append(characters.slice(done, start).join(""));
    const mark = element("mark", {
      class: strength === strongest ? "peak" : "",
      title: `about ${number((strength / 9) * largest, 2)}`,
    }, characters.slice(start, end).join(""));
    mark.style.setProperty("--strength", (0.1 + strength / 12).toFixed(2));
    line.append(mark);
    done = end;
  }
  line.append(characters.slice(done).join(""));
  return element("div", {}, line, element("p", { class: "quiet origin" }, origin));
}

function tokenList(tokens) {
  return element("span", { class: "token" }, tokens.slice(0, 3).map(visible).join("  "));
}

function linkList(name, found) {
  if (!found.length) return quiet("None fires together with it.");
  return element("ul", { class: "links" }, ...found.map(([feature, phi, tokens]) =>
    element("li", {}, featureLink(name, feature), ` φ = ${number(phi, 2)} `, tokenList(tokens))));
}

async function card(arm, i) {
  const block = Math.floor(i / arm.block);
  const feature = (await load(`${arm.name}/block-${block}`)).features[i - block * arm.block];
  const contexts = await Promise.all(feature.contexts.map((c) => context(c, arm.max[i])));
  const facts = [["Threshold", number(feature.threshold)], ["Largest activation", number(arm.max[i])],
    ["Fuzzing score", number(arm.fuzz[i], 2)], ["Split (φ with the second partner)", number(arm.split[i], 2)]];
  const parts = [
    element("h2", {}, `${arm.name}, feature ${i}`),
    element("p", {}, arm.explanation[i] ?? "Not explained in this run."),
    element("p", {}, "Peaks on: ", element("span", { class: "token" },
      arm.tokens[i].map(visible).join("   ") || "–")),
    element("dl", {}, ...facts.map(([name, value]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, value)))),
    element("div", { class: "looks" },
      element("div", {}, element("h3", {}, "Logit lens"), lens(feature.lens),
        quiet("What its decoder row alone adds to the logits, above the mean of the vocabulary: the row at "
          + "unit size through the model’s final norm and unembedding. What later layers make of it is left "
          + "out, so this tells little at an early layer.")),
      element("div", {}, element("h3", {}, "Firing rate"), ...density(arm, i),
        element("h3", {}, "Activations in its contexts"), activations(arm, i, feature))),
    element("h3", {}, "Contexts, strongest first"),
    ...(feature.contexts.length ? contexts : [quiet("None.")]),
  ];
  if (arm.other) {
    const partner = arm.partner[i];
    parts.push(element("h3", {}, `Matched partner in ${arm.other}`));
    parts.push(partner === null ? quiet("No partner.")
      : element("p", {}, featureLink(arm.other, partner),
        ` cosine ${number(feature.cosine, 2)}, φ = ${number(arm.phi[i], 2)} `, tokenList(feature.partner)));
    parts.push(element("h3", {}, `Fires together with, in ${arm.other}`), linkList(arm.other, feature.cross));
  }
  const near = feature.near.map(([other, phi]) => [other, phi, arm.tokens[other]]);
  parts.push(element("h3", {}, `Fires together with, in ${arm.name}`), linkList(arm.name, near));
  return parts;
}

// The feature that the address names, or else the first of the list.
function current() {
  return state.feature ?? shown[0];
}

async function drawCards(arm, ticket) {
  const i = current();
  const partner = i === undefined ? null : arm.partner[i];
  const both = Boolean(state.pair) && partner !== null;
  const drawn = i === undefined ? [] : [card(arm, i)];
  if (both) drawn.push(loadArm(arm.other).then((other) => card(other, partner)));
  const [own = [], other = []] = await Promise.all(drawn);
  if (ticket !== drawing) return;
  const open = element("a", { href: address({ feature: i, pair: both ? "" : "1" }) },
    both ? "Back to the list" : `Side by side with its partner, ${arm.other} ${partner}`);
  at("pair").replaceChildren(...(partner === null ? [] : [open]));
  at("card").replaceChildren(...own);
  at("other").replaceChildren(...other);
  at("columns").classList.toggle("pair", both);
  const peaks = i === undefined ? [] : arm.tokens[i];
  at("said").textContent = i === undefined ? "No feature is shown."
    : `${arm.name}, feature ${i}, peaks on ${peaks.map(visible).join(", ") || "nothing"}`
      + (both ? `, beside ${arm.other}, feature ${partner}` : "");
}

async function show() {
  const ticket = ++drawing;
  state = readAddress();
  at("arm").value = state.arm;
  for (const key of FILTERS) {
    if (document.activeElement !== at(key)) at(key).value = state[key] || (key === "sort" ? SPLITS : "");
  }
  try {
    const arm = await loadArm(state.arm);
    if (ticket !== drawing) return;
    if (state.feature >= arm.text.length) state.feature = undefined;
    drawList(arm);
    await drawCards(arm, ticket);
    document.documentElement.dataset.ready = location.hash;
  } catch (error) {
    at("count").textContent = error.message;
  }
}

function move(step) {
  if (!shown.length) return;
  const here = shown.indexOf(current());
  const next = here < 0 ? state.page * PER_PAGE : Math.min(Math.max(here + step, 0), shown.length - 1);
  go({ feature: shown[next], page: Math.floor(next / PER_PAGE) });
}

async function partner() {
  const arm = await loadArm(state.arm);
  const target = arm.partner[current()] ?? null;
  if (target !== null) go({ arm: arm.other, feature: target, page: 0 });
}

const KEYS = {
  "/": () => at("q").focus(), j: () => move(1), k: () => move(-1), m: partner,
  b: () => at("pair").querySelector("a")?.click(),
  n: () => at("next").click(), p: () => at("previous").click(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName);
  if (event.key === "Escape") { at("results").focus(); return; }
  if (typing || !KEYS[event.key]) return;
  event.preventDefault();
  KEYS[event.key]();
});

async function start() {
  try {
    site = await load("site");
  } catch (error) {
    at("count").textContent = error.message;
    return;
  }
  document.title = `Feature explorer: ${site.profile}`;
  at("profile").textContent = `of ${site.profile}`;
  at("about").textContent = site.about;
  at("back").href = site.back;
  at("arm").append(...site.arms.map((arm) =>
    element("option", { value: arm.name }, [arm.name, ...arm.same].join(" = "))));
  at("arm").addEventListener("change", () => go({ arm: at("arm").value, feature: undefined, page: 0 }));
  for (const key of FILTERS) {
    at(key).addEventListener("input", () => go({ [key]: at(key).value, page: 0 }, false));
  }
  at("filters").addEventListener("submit", (event) => event.preventDefault());
  at("filters").addEventListener("reset", (event) => {
    event.preventDefault();
    at("q").focus();
    FILTERS.forEach((key) => { at(key).value = ""; });
    go({ ...Object.fromEntries(FILTERS.map((key) => [key, ""])), page: 0 });
  });
  at("previous").addEventListener("click", () => go({ page: state.page - 1 }));
  at("next").addEventListener("click", () => go({ page: state.page + 1 }));
  window.addEventListener("hashchange", show);
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault(); // the address names a feature, not a place of the page
    at("results").focus();
  });
  show();
}

start();
