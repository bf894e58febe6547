"use strict";
// No library, no server: data come as script files that hand over one deflated JSON text each, because
// a page opened from disk may not fetch. Text of the corpus reaches the page as text only.

const PER_PAGE = 50;
const FILTERS = ["q", "min_rate", "max_rate", "min_fuzz", "min_phi", "max_phi", "sort"];
const COLUMNS = ["tokens", "rate", "max", "partner", "phi", "second", "fuzz", "explanation"];
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
  for (const key of ["arm", "feature", ...FILTERS, "page"]) {
    const value = next[key];
    const idle = value === undefined || value === "" || (key === "page" && Number(value) === 0)
      || (key === "sort" && value === "feature");
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

function readAddress() {
  const hash = new URLSearchParams(location.hash.slice(1));
  const known = new Set(site.arms.map((arm) => arm.name));
  const next = { arm: known.has(hash.get("arm")) ? hash.get("arm") : site.arms[0].name };
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
  if (words.length === 1 && /^\d+$/.test(words[0])) {
    // A number asks for that feature first, whatever else holds its digits.
    const wanted = Number(words[0]);
    found.sort((a, b) => (b === wanted) - (a === wanted));
  }
  const descending = state.sort.startsWith("-");
  const column = arm[state.sort.replace("-", "")];
  if (column) {
    const rank = (i) => column[i] ?? (descending ? -Infinity : Infinity);
    found.sort((a, b) => (descending ? rank(b) - rank(a) : rank(a) - rank(b)) || a - b);
  }
  return found;
}

function featureLink(arm, feature, text) {
  return element("a", { href: address({ arm, feature, page: arm === state.arm ? state.page : 0 }) },
    text ?? feature);
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
    const row = element("tr", i === state.feature ? { "aria-current": "true" } : {},
      element("th", { scope: "row", class: "number" }, featureLink(arm.name, i)),
      element("td", { class: "token" }, visible(arm.tokens[i][0] ?? "–")),
      numeric(number(arm.rate[i])), numeric(number(arm.max[i])), partner,
      numeric(number(arm.phi[i], 2)), numeric(number(arm.fuzz[i], 2)),
      element("td", {}, arm.explanation[i] ?? "–"));
    return row;
  });
  at("rows").replaceChildren(...rows);
}

function histogram(counts, largest) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const highest = Math.max(...counts, 1);
  const total = counts.reduce((sum, count) => sum + count, 0);
  svg.setAttribute("viewBox", "0 0 300 70");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label",
    `Histogram of ${total} activations from 0 to ${number(largest)}: ${counts.join(", ")}`);
  const width = 300 / counts.length;
  counts.forEach((count, i) => {
    const bar = document.createElementNS(svg.namespaceURI, "rect");
    const height = (count / highest) * 55;
    for (const [key, value] of Object.entries({
      x: i * width + 0.5, y: 57 - height, width: width - 1, height })) bar.setAttribute(key, value);
    svg.append(bar);
  });
  [[0, "start", "0"], [300, "end", number(largest)]].forEach(([x, anchor, words]) => {
    const label = document.createElementNS(svg.namespaceURI, "text");
    label.setAttribute("x", x);
    label.setAttribute("y", 68);
    label.setAttribute("text-anchor", anchor);
    label.textContent = words;
    svg.append(label);
  });
  return svg;
}

// [text, [[start, end, strength 1-9], …], origin] with positions in characters, not in UTF-16 units.
function context([text, spans, origin], largest) {
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

function linkList(arm, pairs) {
  if (!pairs.length) return element("p", { class: "quiet" }, "None fires together with it.");
  return element("ul", { class: "links" }, ...pairs.map(([feature, phi]) => element("li", {},
    featureLink(arm.name, feature), ` φ = ${number(phi, 2)} `,
    element("span", { class: "token" }, (arm.tokens[feature] ?? []).slice(0, 3).map(visible).join("  ")))));
}

async function drawCard(arm, ticket) {
  const card = at("card");
  const i = state.feature;
  if (i === undefined || i >= arm.text.length) { card.replaceChildren(); return; }
  const block = Math.floor(i / arm.block);
  const [data, other] = await Promise.all([
    load(`${arm.name}/block-${block}`), arm.other ? loadArm(arm.other) : null]);
  if (ticket !== drawing) return;
  const feature = data.features[i - block * arm.block];
  const facts = [["Firing rate", number(arm.rate[i])], ["Threshold", number(feature.threshold)],
    ["Largest activation", number(arm.max[i])], ["Fuzzing score", number(arm.fuzz[i], 2)]];
  const parts = [
    element("h2", {}, `${arm.name}, feature ${i}`),
    element("p", {}, arm.explanation[i] ?? "Not explained in this run."),
    element("dl", {}, ...facts.flatMap(([name, value]) =>
      [element("dt", {}, name), element("dd", {}, value)])),
    element("p", {}, "Peaks on: ", element("span", { class: "token" },
      arm.tokens[i].map(visible).join("   ") || "–")),
    element("h3", {}, "Activations"),
    feature.histogram.length ? histogram(feature.histogram, arm.max[i])
      : element("p", { class: "quiet" }, "It does not fire in the contexts."),
  ];
  if (other) {
    const partner = arm.partner[i];
    parts.push(element("h3", {}, `Matched partner in ${other.name}`));
    parts.push(partner === null ? element("p", { class: "quiet" }, "No partner.")
      : element("p", {}, featureLink(other.name, partner),
        ` cosine ${number(feature.cosine, 2)}, φ = ${number(arm.phi[i], 2)} `,
        element("span", { class: "token" }, other.tokens[partner].slice(0, 3).map(visible).join("  "))));
    parts.push(element("h3", {}, `Fires together with, in ${other.name}`), linkList(other, feature.cross));
  }
  parts.push(element("h3", {}, `Fires together with, in ${arm.name}`), linkList(arm, feature.near));
  parts.push(element("h3", {}, "Contexts, strongest first"));
  parts.push(...(feature.contexts.length ? feature.contexts.map((c) => context(c, arm.max[i]))
    : [element("p", { class: "quiet" }, "None.")]));
  card.replaceChildren(...parts);
}

async function show() {
  const ticket = ++drawing;
  state = readAddress();
  at("arm").value = state.arm;
  for (const key of FILTERS) {
    if (document.activeElement !== at(key)) at(key).value = state[key] || (key === "sort" ? "feature" : "");
  }
  try {
    const arm = await loadArm(state.arm);
    if (ticket !== drawing) return;
    drawList(arm);
    await drawCard(arm, ticket);
    document.documentElement.dataset.ready = location.hash;
  } catch (error) {
    at("count").textContent = error.message;
  }
}

function move(step) {
  if (!shown.length) return;
  const here = shown.indexOf(state.feature);
  const next = here < 0 ? state.page * PER_PAGE : Math.min(Math.max(here + step, 0), shown.length - 1);
  go({ feature: shown[next], page: Math.floor(next / PER_PAGE) });
}

async function partner() {
  const arm = await loadArm(state.arm);
  const target = arm.partner[state.feature];
  if (arm.other && target !== null && target !== undefined) go({ arm: arm.other, feature: target, page: 0 });
}

const KEYS = {
  "/": () => at("q").focus(), j: () => move(1), k: () => move(-1), m: partner,
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
  at("arm").append(...site.arms.map((arm) => element("option", { value: arm.name }, arm.title)));
  at("arm").addEventListener("change", () => go({ arm: at("arm").value, feature: "", page: 0 }));
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
  show();
}

start();
