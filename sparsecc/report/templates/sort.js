"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  for (const head of table.querySelectorAll("th[data-sort]")) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const order = head.getAttribute("aria-sort") === "descending" ? "ascending" : "descending";
      for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const value = (row) => {
        const cell = (row.rows ? row.rows[0] : row).cells[head.cellIndex];
        return cell.dataset.value ?? cell.textContent;
      };
      const compare = (a, b) => {
        const [x, y] = [value(a), value(b)];
        const [p, q] = [parseFloat(x), parseFloat(y)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const less = Number.isNaN(p) || Number.isNaN(q) ? y.localeCompare(x, "en", { numeric: true }) : p - q;
        return order === "ascending" ? less : -less;
      };
      const [first, ...rest] = table.tBodies; // many bodies: one for each thing that is sorted
      if (rest.length) table.append(...[first, ...rest].sort(compare));
      else first.append(...[...first.rows].sort(compare));
    });
  }
}
