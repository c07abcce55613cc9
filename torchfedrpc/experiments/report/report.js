// Draws the charts of a report from their tables, and lets the timeline show one round after another.
"use strict";

const {charts, config} = JSON.parse(document.getElementById("charts").textContent);

/** Return the visible rows of a table: column -> text or number; null where a number is missing. */
function rowsOf(table) {
  const columns = [...table.tHead.rows[0].cells].map((cell) => [cell.dataset.key, cell.classList.contains("number")]);
  return [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => {
    const values = columns.map(([key, isNumber], index) => {
      const text = row.cells[index].textContent;
      const number = isNumber ? parseFloat(text) : text;
      return [key, Number.isNaN(number) ? null : number];
    });
    return Object.fromEntries(values);
  });
}

/** Return a row per value of the columns of series, which a chart has by their title. */
function melted(rows, series) {
  return rows.flatMap((row) =>
    Object.entries(series).map(([key, title]) => ({...row, series: title, value: row[key]}))
  );
}

async function draw(figure) {
  const {spec, series, events} = charts[figure.dataset.chart];
  const rows = rowsOf(figure.querySelector("table"));
  const datasets = {rows: series ? melted(rows, series) : rows};
  if (events) datasets.events = rowsOf(document.querySelector(`#${events} table`));
  const place = figure.querySelector(".chart");
  place.hidden = false;
  const options = {renderer: "svg", actions: false, ast: true, config};
  await vegaEmbed(place, {...spec, datasets}, options);
  place.querySelector("svg").setAttribute("aria-hidden", "true");  // its place has the role and the label
}

/** Let the calls of one round be shown, which a list and two buttons choose. */
function addRoundPicker(figure) {
  const controls = figure.querySelector(".controls");
  const [list] = controls.getElementsByTagName("select");
  const [back, forth] = controls.getElementsByTagName("button");
  const rows = [...figure.querySelector("table").tBodies[0].rows];
  const show = () => {
    for (const row of rows) row.hidden = row.cells[0].textContent !== list.value;
    back.disabled = list.selectedIndex === 0;
    forth.disabled = list.selectedIndex === list.length - 1;
    return draw(figure);
  };
  for (const round of new Set(rows.map((row) => row.cells[0].textContent))) list.add(new Option(round));
  list.addEventListener("change", show);
  for (const [button, step] of [[back, -1], [forth, 1]]) {
    button.addEventListener("click", () => { list.selectedIndex += step; show(); });
  }
  controls.hidden = false;
  return show();
}

const drawn = [...document.querySelectorAll("figure[data-chart]")].map((figure) =>
  figure.querySelector(".controls") ? addRoundPicker(figure) : draw(figure)
);
Promise.all(drawn).then(() => { document.documentElement.dataset.drawn = drawn.length; });
