"use strict";

// Light or dark: the system's choice until the button is pressed.
const root = document.documentElement;
const themeButton = document.getElementById("theme");
const systemDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
const nameTheme = () => { themeButton.textContent = isDark() ? "Light" : "Dark"; };
themeButton.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  nameTheme();
});
systemDark.addEventListener("change", nameTheme);
themeButton.hidden = false;
nameTheme();

// Tables: each body is sorted in itself, so measured and published rows never mix.
function sortBy(header) {
  const table = header.closest("table");
  const column = header.cellIndex;
  const numbers = header.dataset.kind === "number";
  const before = header.getAttribute("aria-sort");
  const ascending = before ? before === "descending" : !numbers;
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const valueOf = (row) => {
    const cell = row.cells[column];
    if (!numbers) return cell.textContent.trim();
    return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
  };
  const compare = (one, other) => {
    const [a, b] = [valueOf(one), valueOf(other)];
    if (a === null || b === null) return (a === null) - (b === null);
    return (numbers ? a - b : a.localeCompare(b)) * (ascending ? 1 : -1);
  };
  for (const body of table.tBodies) {
    const rows = [...body.rows].filter((row) => !row.classList.contains("divider"));
    body.append(...rows.sort(compare));
  }
}
for (const button of document.querySelectorAll(".list thead button")) {
  button.addEventListener("click", () => sortBy(button.closest("th")));
}

// Tips, for a pointer and, with the arrow keys, inside the figure that has the focus.
const tip = document.getElementById("tip");
const MARKS = "[data-tip], .heat td";

function textOf(mark) {
  if (mark.dataset.tip) return mark.dataset.tip;
  const table = mark.closest("table");
  const parts = {
    value: mark.textContent.trim(),
    row: mark.parentElement.cells[0].textContent.trim(),
    column: table.tHead.rows[0].cells[mark.cellIndex].textContent.trim(),
  };
  const text = table.dataset.sentence.replace(/\{(\w+)\}/g, (_, key) => parts[key]);
  return mark.dataset.note ? `${text}, ${mark.dataset.note}` : text;
}

function show(mark, x, y) {
  tip.textContent = textOf(mark);
  tip.classList.add("shown");
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(Math.max(x - width / 2, 6), innerWidth - width - 6);
  const top = y - height - 14 < 6 ? y + 18 : y - height - 14;
  tip.style.transform = `translate(${left}px, ${top}px)`;
}
const hide = () => tip.classList.remove("shown");

const markAt = (x, y) => document.elementFromPoint(x, y)?.closest(MARKS);
let pointer = { x: 0, y: 0, mark: null };
document.addEventListener("pointerover", (event) => {
  pointer = { x: event.clientX, y: event.clientY, mark: event.target.closest(MARKS) };
  if (pointer.mark) show(pointer.mark, pointer.x, pointer.y);
  else hide();
});

let current = null;
function leave() {
  if (current) current.classList.remove("at");
  current = null;
  hide();
}
function step(figure, key) {
  const marks = [...figure.querySelectorAll(MARKS)];
  const row = figure.matches(".heat") ? figure.tHead.rows[0].cells.length - 1 : 1;
  const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: row, ArrowUp: -row }[key];
  const at = current === null ? 0 : marks.indexOf(current) + by;
  if (!(at in marks)) return;
  leave();
  current = marks[at];
  current.classList.add("at");
  current.scrollIntoView({ block: "nearest", inline: "nearest" });
  const box = current.getBoundingClientRect();
  show(current, box.x + box.width / 2, box.y);
}
for (const figure of document.querySelectorAll(".explore")) {
  figure.addEventListener("keydown", (event) => {
    if (event.key === "Escape") leave();
    else if (event.key.startsWith("Arrow")) {
      event.preventDefault();
      step(figure, event.key);
    }
  });
  figure.addEventListener("blur", leave);
}
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
document.addEventListener("scroll", () => {
  if (!current && markAt(pointer.x, pointer.y) !== pointer.mark) hide();
}, { passive: true, capture: true });

// Paper shows everything.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
