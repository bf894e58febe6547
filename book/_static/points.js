"use strict";
// Figures whose points can be pointed at and chosen. Their places stand in a script of the class
// `points` behind the picture. What is chosen is ringed in every such figure of the page, its rows
// are marked in the tables, and a panel leads on. Without this script, and in print, there is the
// picture alone.
document.addEventListener("DOMContentLoaded", () => {
  const scripts = [...document.querySelectorAll("script.points")];
  if (!scripts.length) return;
  const make = (tag, attributes, ...children) => {
    const made = document.createElement(tag);
    Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
    made.append(...children);
    return made;
  };
  // A setting stands for its arms, which carry its name and a seed.
  const same = (a, b) => a && b && (a === b || a.startsWith(`${b}-seed`) || b.startsWith(`${a}-seed`));
  const rows = [...document.querySelectorAll("article tbody tr")];
  const profile = location.pathname.split("/").at(-2);
  const hint = "Point at a mark, or go from one to the next with the arrow keys; choose one to find its arms "
    + "in tables, curves and the explorer.";
  const panel = make("div", { class: "picked", role: "status" }, hint);
  const buttons = [];

  const choose = (button) => {
    const arm = button?.dataset.arm;
    buttons.forEach((other) => {
      const on = other === button || same(other.dataset.arm, arm);
      other.setAttribute("aria-pressed", String(Boolean(button) && on));
    });
    rows.forEach((row) => row.classList.toggle("picked", Boolean(same(row.cells[0].textContent.trim(), arm))));
    panel.replaceChildren(button?.getAttribute("aria-label") ?? hint);
    button?.closest("figure").after(panel);
    if (!arm) return;
    const row = rows.find((one) => one.classList.contains("picked"));
    if (row) row.id ||= `row-${arm}`;
    const others = buttons.filter((other) => other.getAttribute("aria-pressed") === "true"
      && other.closest("figure") !== button.closest("figure"));
    const links = [
      [row && `#${row.id}`, "Its row"],
      [others.length && `#${others[0].closest("figure").id}`, "In the other figure"],
      [`02_training.html#fig-training-l2-${profile}`, "Training curves"],
      [`../explorer/${profile}/index.html#arm=${encodeURIComponent(arm)}`, "Its features"],
    ];
    panel.append(make("ul", {}, ...links.filter(([href]) => href)
      .map(([href, words]) => make("li", {}, make("a", { href }, words)))));
  };

  scripts.forEach((script) => {
    const before = (figure) => figure.compareDocumentPosition(script) & Node.DOCUMENT_POSITION_FOLLOWING;
    const image = [...document.querySelectorAll("article figure")].filter(before).at(-1).querySelector("img");
    const frame = make("div", { class: "points", role: "group",
      "aria-label": "Points of the figure: arrow keys go from one to the next, Enter chooses, Escape lets go" });
    image.before(frame);
    const own = JSON.parse(script.textContent).sort((a, b) => a.left - b.left).map((point, i) => {
      const button = make("button", { type: "button", "aria-label": point.words, "aria-pressed": "false",
        "data-arm": point.arm, tabindex: i ? -1 : 0 });
      button.style.setProperty("--left", point.left);
      button.style.setProperty("--top", point.top);
      button.addEventListener("click", () =>
        choose(button.getAttribute("aria-pressed") === "true" ? null : button));
      return button;
    });
    frame.append(image, ...own);
    if (!buttons.length) frame.closest("figure").after(panel);
    buttons.push(...own);
    frame.addEventListener("keydown", (event) => {
      const here = own.indexOf(document.activeElement);
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") choose(null);
      if (!step) return;
      event.preventDefault();
      const next = own[(here + step + own.length) % own.length];
      own.forEach((button) => { button.tabIndex = button === next ? 0 : -1; });
      next.focus();
    });
  });
});
