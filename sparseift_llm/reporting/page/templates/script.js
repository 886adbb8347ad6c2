"use strict";
// Reads values out while a pointer is over a chart; they come from the figure's own table.
for (const figure of document.querySelectorAll("figure[data-table]")) {
  const plot = figure.querySelector(".plot"), chart = figure.querySelector(".chart"), output = figure.querySelector("output");
  const low = Number(plot.dataset.low), high = Number(plot.dataset.high), x = Number(plot.dataset.x);
  const columns = plot.dataset.y.split(" ").map(Number);
  let titles, bodies;
  const load = () => {
    const table = document.getElementById(figure.dataset.table).querySelector("table");
    titles = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
    bodies = [...table.tBodies].map((body) => {
      const rows = [...body.rows].map((row) => [...row.cells].map((cell) => cell.textContent));
      return { name: rows[0][0], rows: rows.slice(1) };
    });
  };
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y2", "100%");
  const clear = () => { cursor.remove(); output.textContent = ""; };
  const nearest = (rows, column, value) => {
    let best;
    for (const row of rows) {
      const distance = Math.abs(Number(row[x]) - value);
      if (Number.isFinite(Number(row[column])) && !(distance >= best?.distance)) best = { row, distance };
    }
    return best?.row;
  };
  const show = (event) => {
    if (!bodies) load();
    const box = chart.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, `${100 * share}%`);
    chart.append(cursor);
    const words = [];
    for (const body of bodies) {
      for (const column of columns) {
        const row = nearest(body.rows, column, low + share * (high - low));
        if (row) words.push(`${body.name}, step ${row[0]}: ${columns.length > 1 ? titles[column] + " " : ""}${row[column]}`);
      }
    }
    output.textContent = words.join("; ");
  };
  for (const type of ["pointerdown", "pointermove"]) chart.addEventListener(type, show);
  chart.addEventListener("pointerleave", clear);
}
