"use strict";
(() => {
  const byId = (id) => document.getElementById(id);

  // Pairs: a slider wipes from a sample to the image that it is compared with, beside the difference of the two.
  function showPairs(area) {
    const tiles = [...area.querySelectorAll(".duo")];
    const headings = [...area.querySelectorAll("h3")];
    const gain = byId("pairs-gain");
    const value = (name) => byId(`pairs-${name}`)?.value ?? "";
    const parts = new Map(tiles.map((tile) => [tile, build(tile)]));
    let order = "desc";

    function made(kind, properties) {
      return Object.assign(document.createElement(kind), properties);
    }

    // An image of the pair once more, for the eye alone: the first has a text already.
    function again(image, name) {
      return made("img", {src: image.src, alt: "", className: `${image.className} ${name}`});
    }

    function build(tile) {
      const images = new Map([...tile.querySelectorAll("figure")].map((one) => [one.dataset.kind, one.querySelector("img")]));
      const sample = images.get("sample");
      const frame = sample.parentElement;
      const over = again(sample, "over");
      const range = made("input", {type: "range", min: 0, max: 100, step: 1, value: 0, autocomplete: "off"});
      frame.classList.add("wipes");
      frame.append(over, made("span", {className: "cut", hidden: true}));
      frame.parentElement.append(range);
      const [blend, square] = [made("div", {className: "blend"}), made("div", {className: "frame"})];
      const top = again(sample, "top");
      blend.append(again(sample, "bottom"), top);
      square.append(blend);
      const figure = made("figure", {});
      const caption = made("figcaption", {});
      caption.append(made("b", {textContent: "Difference"}), made("span", {}));
      figure.dataset.kind = "difference";
      figure.append(square, caption);
      tile.querySelector(".panels").append(figure);
      const part = {images, over, range, top, frame, note: caption.lastChild};
      range.addEventListener("input", () => wipe(part));
      const drag = (event) => {
        if (event.type === "pointermove" && !event.buttons) return;
        const box = frame.getBoundingClientRect();
        range.value = Math.round((100 * (event.clientX - box.left)) / box.width);
        wipe(part);
      };
      for (const kind of ["pointerdown", "pointermove"]) frame.addEventListener(kind, drag);
      return part;
    }

    function wipe(part) {
      part.frame.style.setProperty("--cut", `${part.range.value}%`);
      part.frame.lastChild.hidden = part.range.value === "0" || part.range.value === "100";
      part.range.setAttribute("aria-valuetext", `${part.range.value} % ${part.name}`);
    }

    // With what each sample is compared: what was chosen, or the one image that there is.
    function pair() {
      for (const [tile, part] of parts) {
        const kind = [value("with"), "twins", "starts"].find((name) => part.images.has(name));
        const other = part.images.get(kind);
        part.name = kind === "twins" ? "unguided twin" : "start";
        part.over.src = part.top.src = other.src;
        part.range.setAttribute("aria-label", `Wipe from the sample to its ${part.name}, ${tile.dataset.key}`);
        part.note.textContent = `to the ${part.name}`;
        wipe(part);
      }
    }

    function amplify() {
      const factor = 2 ** Number(gain.value);
      area.style.setProperty("--gain", factor);
      gain.nextElementSibling.value = `× ${factor}`;
      gain.setAttribute("aria-valuetext", `${factor} times`);
    }

    function arrange() {
      const score = value("sort");
      const scores = new Map(tiles.map((tile) => [tile, score in tile.dataset ? Number(tile.dataset[score]) : undefined]));
      const compare = (a, b) => {
        const [first, second] = [scores.get(a), scores.get(b)];
        if (first === undefined || second === undefined) return (first === undefined) - (second === undefined);
        return order === "asc" ? first - second : second - first;
      };
      const shown = tiles.filter((tile) => value("request") === "" || tile.dataset.request === value("request"));
      tiles.forEach((tile) => tile.toggleAttribute("hidden", !shown.includes(tile)));
      for (const heading of headings) {
        const used = shown.some((tile) => tile.dataset.request === heading.dataset.request);
        heading.toggleAttribute("hidden", Boolean(score) || !used);
        const own = tiles.filter((tile) => tile.dataset.request === heading.dataset.request);
        if (!score) area.append(heading, ...own);
      }
      if (score) area.append(...[...tiles].sort(compare));
      byId("pairs-order").disabled = !score;
      byId("pairs-order").textContent = order === "asc" ? "Lowest first" : "Highest first";
      byId("pairs-count").textContent = `${shown.length} of ${tiles.length} shown`;
    }

    byId("pairs-order").addEventListener("click", () => {
      order = order === "asc" ? "desc" : "asc";
      arrange();
    });
    for (const name of ["sort", "request"]) byId(`pairs-${name}`)?.addEventListener("change", arrange);
    byId("pairs-with")?.addEventListener("change", pair);
    gain.addEventListener("input", amplify);
    pair();
    amplify();
    arrange();
  }

  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      const series = button.dataset.series;
      for (const other of document.querySelectorAll(`.legend button[data-series="${series}"]`)) {
        other.setAttribute("aria-pressed", String(shown));
      }
      for (const part of document.querySelectorAll(`g[data-series="${series}"]`)) {
        part.toggleAttribute("hidden", !shown);
      }
    });
  }

  if (byId("duos")) showPairs(byId("duos"));

  const grid = byId("tiles");
  if (!grid) return;
  const data = JSON.parse(byId("gallery-data").textContent);
  const samples = data.samples;
  const tiles = [...grid.querySelectorAll(".tile")];
  const headings = [...grid.querySelectorAll("h3")];
  const filters = ["request", "class", "context", "target", "oracle", "outcome", "status"].filter((name) => byId(`by-${name}`));
  const bounds = [...document.querySelectorAll(".ranges input")];
  const ranges = [...new Set(bounds.map((input) => input.id.slice(4)))];
  const places = new Map(samples.map((sample, number) => [sample.key, number]));
  const control = (name) => byId(`by-${name}`);
  const dialog = byId("sample");
  let order = "desc";
  let visible = [];
  let opened = -1;
  let opener;

  function offers(select, value) {
    return [...select.options].some((option) => option.value === value);
  }

  const bound = (side, name) => (byId(`${side}-${name}`).value === "" ? null : Number(byId(`${side}-${name}`).value));

  // A sample without scores is in no range.
  function inRange(sample, name) {
    const [low, high, value] = [bound("min", name), bound("max", name), sample.scores[name]];
    if (low === null && high === null) return true;
    return value !== undefined && (low === null || value >= low) && (high === null || value <= high);
  }

  function matches(sample) {
    return ranges.every((name) => inRange(sample, name)) && filters.every((name) => {
      const wanted = control(name).value;
      return wanted === "" || (name === "outcome" ? sample.outcomes.includes(wanted) : sample[name] === wanted);
    });
  }

  // Samples without the score come last in either direction; equal scores keep the order of the selection.
  function compare(first, second, score) {
    const [a, b] = [samples[first].scores[score], samples[second].scores[score]];
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined) || first - second;
    return (order === "asc" ? a - b : b - a) || first - second;
  }

  function arrange() {
    const score = control("sort").value;
    const numbers = samples.map((_, number) => number);
    if (score) numbers.sort((a, b) => compare(a, b, score));
    visible = numbers.filter((number) => matches(samples[number]));
    const shown = new Set(visible);
    tiles.forEach((tile, number) => tile.toggleAttribute("hidden", !shown.has(number)));
    for (const heading of headings) {
      const used = visible.some((number) => samples[number].request === heading.dataset.request);
      heading.toggleAttribute("hidden", Boolean(score) || !used);
    }
    if (score) grid.append(...numbers.map((number) => tiles[number]));
    else for (const heading of headings) {
      grid.append(heading, ...tiles.filter((_, number) => samples[number].request === heading.dataset.request));
    }
    byId("count").textContent = `${visible.length} of ${samples.length} shown`;
    byId("order").textContent = order === "asc" ? "Lowest first" : "Highest first";
    byId("order").disabled = !score;
  }

  function remember() {
    const state = new URLSearchParams();
    for (const name of filters) if (control(name).value) state.set(name, control(name).value);
    for (const input of bounds) if (input.value !== "") state.set(input.id, input.value);
    if (control("sort").value) {
      state.set("sort", control("sort").value);
      state.set("order", order);
    }
    if (opened >= 0) state.set("open", samples[opened].key);
    history.replaceState(null, "", `#${state.toString() || "gallery"}`);
  }

  function restore() {
    const state = new URLSearchParams(location.hash.slice(1));
    const known = [...filters, "sort"].filter((name) => state.has(name));
    for (const name of known) {
      if (offers(control(name), state.get(name))) control(name).value = state.get(name);
    }
    for (const input of bounds.filter((one) => state.has(one.id))) {
      if (Number.isFinite(Number(state.get(input.id)))) input.value = state.get(input.id);
      known.push(input.id);
      document.querySelector(".ranges").open = true;
    }
    if (state.has("order")) order = state.get("order") === "asc" ? "asc" : "desc";
    arrange();
    const number = samples.findIndex((sample) => sample.key === state.get("open"));
    if (number >= 0) open(number);
    else if (known.length) byId("gallery").scrollIntoView();
  }

  function row(name, text) {
    const line = document.createElement("tr");
    const head = document.createElement("th");
    const cell = document.createElement("td");
    head.scope = "row";
    head.textContent = name;
    cell.textContent = text;
    line.append(head, cell);
    return line;
  }

  function open(number) {
    const sample = samples[number];
    const picture = tiles[number].querySelector("img");
    const large = byId("sample-image");
    opened = number;
    byId("sample-key").textContent = sample.key;
    byId("sample-fields").replaceChildren(...data.fields.map((name, place) => row(name, sample.values[place])));
    large.toggleAttribute("hidden", !picture);
    if (picture) {
      large.src = picture.src;
      large.alt = picture.alt;
      large.className = picture.className;
    }
    byId("previous").disabled = visible.indexOf(number) <= 0;
    byId("next").disabled = visible.indexOf(number) === visible.length - 1;
    mark(sample.key);
    if (!dialog.open) dialog.showModal();
    remember();
  }

  // The point of an open sample stands out in the scatter plot.
  function mark(key) {
    for (const dot of document.querySelectorAll(".plot .dot")) dot.classList.toggle("chosen", dot.dataset.key === key);
  }

  // Opened from outside of the gallery a sample may be filtered away; the arrows then go through all of them.
  function openKey(key, from) {
    const number = places.get(key);
    if (number === undefined) return;
    if (!visible.includes(number)) reset();
    opener = from;
    open(number);
  }

  function reset() {
    for (const name of [...filters, "sort"]) control(name).value = "";
    for (const input of bounds) input.value = "";
    order = "desc";
    arrange();
    remember();
  }

  function step(offset) {
    const number = visible[visible.indexOf(opened) + offset];
    if (number !== undefined) open(number);
  }

  tiles.forEach((tile, number) => tile.addEventListener("click", () => open(number)));
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
    if (["ArrowLeft", "ArrowRight"].includes(event.key)) event.preventDefault();
  });
  dialog.addEventListener("close", () => {
    const last = opened;
    opened = -1;
    mark("");
    remember();
    // A reader of the pairs goes on there, unless the arrows led away.
    if (last >= 0) (opener?.dataset.key === samples[last].key ? opener : tiles[last]).focus();
    opener = undefined;
  });
  for (const name of [...filters, "sort"]) {
    control(name).addEventListener("change", () => {
      arrange();
      remember();
    });
  }
  byId("order").addEventListener("click", () => {
    order = order === "asc" ? "desc" : "asc";
    arrange();
    remember();
  });
  byId("reset").addEventListener("click", reset);
  for (const input of bounds) {
    input.addEventListener("input", () => {
      arrange();
      remember();
    });
  }
  for (const item of document.querySelectorAll(".plot .dot, .picture[data-key]")) {
    if (!places.has(item.dataset.key)) continue;
    item.classList.add("opens");
    item.addEventListener("click", () => openKey(item.dataset.key));
  }
  for (const key of document.querySelectorAll(".key")) key.addEventListener("click", () => openKey(key.dataset.key, key));
  window.addEventListener("hashchange", restore);
  restore();
})();
