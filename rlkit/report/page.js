"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);

  // ---- Plots: traces and axes come from figures.py, fonts and colors from the theme of the page.
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function themed(layout) {
    const axis = (options) => ({
      automargin: true, zeroline: false, showline: false, gridcolor: css("--grid"), tickcolor: css("--grid"),
      ...options, title: { standoff: 8, ...options.title },
    });
    return {
      ...layout,
      xaxis: { ...axis(layout.xaxis), showgrid: false },
      yaxis: axis(layout.yaxis),
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: css("--muted") },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 56, r: 14, t: 14, b: 44 }, bargap: 0.3, bargroupgap: 0.08,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      hovermode: "closest",
    };
  }

  const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]] };
  const draw = () => data.figures.forEach((figure, i) =>
    Plotly.react(`figure-${i}`, figure.traces, themed(figure.layout), config));
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  // ---- Rollouts: model output is untrusted, so it is inserted as textContent, never as HTML.
  const table = document.getElementById("rollouts");
  if (!table) return;
  const body = table.tBodies[0];
  const manyRuns = new Set(data.rows.map((row) => row.run)).size > 1;
  const PREVIEW = 180;

  function element(tag, className, text = "") {
    const node = document.createElement(tag);
    node.className = className;
    node.textContent = text;
    return node;
  }

  function folded(text) {
    if (text.length <= PREVIEW && text.split("\n").length <= 6) return element("div", "text", text);
    const details = document.createElement("details");
    const summary = element("summary", "");
    const preview = text.slice(0, PREVIEW).split("\n").slice(0, 5).join("\n");
    summary.append(element("span", "text", `${preview}… `), element("span", "more", `${text.length.toLocaleString("en")} characters`));
    details.append(summary, element("pre", "text", text));
    return details;
  }

  // In a multi-turn rollout, collapse what the environment wrote.
  function conversation(row) {
    if (!row.turns.length) return [folded(row.completion)];
    return row.turns.map(([byModel, text]) => {
      if (byModel) return element("div", "text", text);
      const details = element("details", "reply");
      details.append(element("summary", "more", `environment, ${text.length.toLocaleString("en")} characters`), element("pre", "text", text));
      return details;
    });
  }

  const cell = (...nodes) => { const td = document.createElement("td"); td.append(...nodes); return td; };
  const number = (value) => value === null ? "–" : String(+value.toPrecision(4));
  const source = (row) => manyRuns ? `${row.run}, ${row.source}` : row.source;

  function tableRow(row) {
    const tr = document.createElement("tr");
    const score = row.score === null ? row.status : `${row.status} ${number(row.score)}`;
    tr.append(
      cell(number(row.step)),
      cell(source(row)),
      cell(folded(row.prompt), element("div", "tags", [row.task, row.tags].filter(Boolean).join(" · "))),
      cell(...conversation(row), element("div", "tags", row.parts)),
      cell(folded(row.truth)),
      cell(element("span", `status ${row.status}`, score), element("div", "tags", row.reason)),
      cell(number(row.reward)),
      cell(number(row.length), element("div", "tags", row.truncated ? "truncated" : "")),
    );
    return tr;
  }

  const rows = data.rows.map((row) => ({
    ...row,
    source: source(row),
    node: tableRow(row),
    haystack: [row.prompt, row.completion, ...row.turns.map(([, text]) => text), row.truth, row.task, row.tags].join("\n").toLowerCase(),
  }));
  const field = Object.fromEntries(
    ["search", "status", "source", "first", "last", "count"].map((id) => [id, document.getElementById(id)]));
  for (const name of new Set(rows.map((row) => row.source))) field.source.append(new Option(name));

  function filter() {
    const text = field.search.value.trim().toLowerCase();
    const first = field.first.value === "" ? -Infinity : +field.first.value;
    const last = field.last.value === "" ? Infinity : +field.last.value;
    const everyStep = first === -Infinity && last === Infinity;
    let count = 0;
    for (const row of rows) {
      const shown = row.haystack.includes(text)
        && (!field.status.value || row.status === field.status.value)
        && (!field.source.value || row.source === field.source.value)
        && (everyStep || (row.step !== null && row.step >= first && row.step <= last));
      row.node.hidden = !shown;
      count += shown;
    }
    field.count.textContent = `${count.toLocaleString("en")} shown`;
  }

  function compare(a, b) {
    if (a === null || b === null) return (a === null) - (b === null);
    return typeof a === "string" ? a.localeCompare(b) : a - b;
  }

  function sort(header) {
    const key = header.dataset.key;
    const direction = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const th of table.tHead.rows[0].cells) th.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
    const empty = (row) => row[key] === null;
    // Rows without a value come last in both directions.
    rows.sort((a, b) => empty(a) || empty(b) ? compare(a[key], b[key]) : direction * compare(a[key], b[key]));
    body.append(...rows.map((row) => row.node));
  }

  body.append(...rows.map((row) => row.node));
  for (const id of ["search", "status", "source", "first", "last"]) field[id].addEventListener("input", filter);
  for (const th of table.tHead.rows[0].cells) th.addEventListener("click", () => sort(th));
  filter();
})();
