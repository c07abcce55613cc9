// Returns what is wrong with the structure of a report for people who do not see it.
const faults = [];
const check = (isWell, text) => { if (!isWell) faults.push(text); };
const all = (selector) => [...document.querySelectorAll(selector)];
const named = (element) => (element.getAttribute("aria-label") || element.textContent || element.alt || "").trim();
check(document.documentElement.lang, "the page has no language");
check(document.title, "the page has no title");
for (const landmark of ["main", "header", "nav", "footer"])
  check(all(landmark).length === 1, `there is not one ${landmark}`);
check(all("h1").length === 1, "there is not one h1");
let level = 0;
for (const heading of all("h1, h2, h3, h4")) {
  const next = Number(heading.tagName[1]);
  check(next <= level + 1, `a level is left out before ${named(heading)}`);
  level = next;
}
const ids = all("[id]").map((element) => element.id);
check(new Set(ids).size === ids.length, "an id is there twice");
for (const image of all("img, [role=img]")) check(named(image), "an image has no text");
for (const control of all("button, select, input, summary, a[href]"))
  check(named(control) || (control.labels && control.labels.length), `a control has no name: ${control.outerHTML}`);
for (const control of all("select, input")) check(control.labels.length, "a field has no label");
for (const link of all("a[href^='#']")) check(document.querySelector(link.getAttribute("href")), `${link.href} leads nowhere`);
for (const part of all("section")) check(document.getElementById(part.getAttribute("aria-labelledby")), "a section has no name");
for (const table of all("table")) {
  check(table.caption && table.caption.textContent, "a table has no caption");
  for (const cell of table.querySelectorAll("th")) check(cell.scope, `a heading of a table has no scope: ${cell.textContent}`);
}
for (const chart of all(".chart")) {
  const figure = chart.closest("figure");
  check(figure.querySelector("figcaption").textContent && figure.querySelector("table tbody tr"), "a chart has no table");
  check(chart.querySelector("svg"), `a chart is not drawn: ${figure.id}`);
}
for (const box of all(".scroll")) check(box.tabIndex === 0 && named(box), "a part that scrolls is not reached by keys");
return faults;
