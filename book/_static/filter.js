"use strict";
// Tables of the class `filterable` (scorecards) get a search box and a choice of verdict. Without
// this script every row is simply shown.
document.addEventListener("DOMContentLoaded", () => {
  const tables = [...document.querySelectorAll("table.filterable")];
  if (!tables.length) return;
  const WORST = { agrees: "agrees", "as in the paper": "agrees", made: "agrees",
    "same direction, different size": "direction", disagrees: "disagrees" };
  const rows = tables.flatMap((table) => {
    const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim());
    return [...table.tBodies[0].rows].map((row) => {
      const verdicts = [...row.cells].filter((_, i) => heads[i].endsWith("verdict")).map((cell) => {
        const group = cell.textContent.trim().split(": ")[0];
        cell.classList.add("verdict", WORST[group] ?? "open");
        return group === "other model" ? "other model: not comparable" : group;
      });
      return { row, verdicts, text: row.textContent.toLowerCase() };
    });
  });

  const make = (tag, attributes, ...children) => {
    const made = document.createElement(tag);
    Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
    made.append(...children);
    return made;
  };
  const search = make("input", { type: "search", id: "filter-text", autocomplete: "off" });
  const choice = make("select", { id: "filter-verdict" }, make("option", { value: "" }, "every verdict"));
  const kinds = [...new Set(rows.flatMap(({ verdicts }) => verdicts))];
  choice.append(...kinds.map((kind) => make("option", { value: kind }, kind)));
  const count = make("p", { role: "status" });
  const form = make("form", { class: "filter", "aria-label": "Filter the tables of this page" },
    make("p", {}, make("label", { for: "filter-text" }, "Show rows with"), search),
    make("p", {}, make("label", { for: "filter-verdict" }, "Verdict"), choice),
    make("button", { type: "reset" }, "Clear"), count);

  const show = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach(({ row, verdicts, text }) => {
      row.hidden = !(words.every((word) => text.includes(word))
        && (!choice.value || verdicts.includes(choice.value)));
      shown += !row.hidden;
    });
    tables.forEach((table) => {
      table.hidden = ![...table.tBodies[0].rows].some((row) => !row.hidden);
    });
    count.textContent = `${shown} of ${rows.length} values`;
  };
  form.addEventListener("input", show);
  form.addEventListener("reset", () => setTimeout(show));
  form.addEventListener("submit", (event) => event.preventDefault());
  const first = tables[0].closest(".pst-scrollable-table-container") ?? tables[0];
  first.before(form);
  show();
});
