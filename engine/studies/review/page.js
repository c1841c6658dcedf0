"use strict";
(() => {
  const config = JSON.parse(document.getElementById("config").textContent);
  const find = (id) => document.getElementById(id);
  const isPair = config.mode === "pair";
  const isTyped = !isPair && config.keys.some((key) => key === "");
  const isLong = !isPair && Math.max(...config.keys.map((key) => key.length)) > 1;
  const TINY = 200, LARGE = 448, SHOWN = 60, AHEAD = 8, WAIT = 3000, RETRY = 2000, BATCH = 200;
  const PREFIX = `riskforge-review:${config.design}:`;

  const make = (name, className, text) => {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const random = () => [...crypto.getRandomValues(new Uint8Array(8))].map((one) => one.toString(16).padStart(2, "0")).join("");

  // What this browser keeps, so that a closed tab or a lost server loses nothing.
  const kept = {
    lost: false,
    read(key) {
      try { return JSON.parse(localStorage.getItem(PREFIX + key)); } catch { return null; }
    },
    write(key, value) {
      try {
        if (value === null) localStorage.removeItem(PREFIX + key);
        else localStorage.setItem(PREFIX + key, JSON.stringify(value));
        return true;
      } catch { kept.lost = true; return false; }
    },
    keys() {
      try {
        return Object.keys(localStorage).filter((key) => key.startsWith(PREFIX)).map((key) => key.slice(PREFIX.length));
      } catch { return []; }
    },
  };

  const say = (text) => { find("notice").textContent = text; find("notice").hidden = !text; };
  const plural = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;

  // Answers go to the server one by one; what it has not confirmed stays in the browser and is sent again.
  const server = () => {
    const session = random();
    const memory = new Map();
    let isDown = false, sending = null, timer = 0;
    const waiting = () => {
      for (const key of kept.keys()) if (key.startsWith("queue:") && !memory.has(key)) memory.set(key, kept.read(key));
      return [...memory].filter(([, queue]) => queue && queue.answers && queue.answers.length);
    };
    const post = async (path, body) => {
      const stop = new AbortController();
      const limit = setTimeout(() => stop.abort(), path === "begin" ? 60000 : 15000);
      try {
        return await fetch(path, {
          method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body), signal: stop.signal,
          credentials: "omit", keepalive: path === "answers",
        });
      } finally { clearTimeout(limit); }
    };
    const refused = async (response) => {
      let reason = "";
      try { reason = (await response.json()).error || ""; } catch { reason = ""; }
      if (response.status === 404) return "This address is no longer valid. Open the one that the command prints now.";
      return reason || `The server refuses (${response.status}).`;
    };
    const report = (reason) => {
      const number = waiting().reduce((sum, [, queue]) => sum + queue.answers.length, 0);
      if (!number) return say(kept.lost ? "This browser keeps nothing: leave the page open until the last answer is stored." : "");
      const why = reason || "The server does not answer.";
      say(`${why} ${plural(number, "answer")} ${number === 1 ? "is" : "are"} kept in this browser and sent when it is back. You can go on.`);
    };
    const sent = (key, queue, some) => {
      queue.answers.splice(0, some.length);
      // Another page may have added to its own queue meanwhile.
      const left = key.endsWith(session) ? queue : kept.read(key);
      const gone = new Set(some.map((one) => JSON.stringify(one)));
      const rest = left ? left.answers.filter((one) => !gone.has(JSON.stringify(one))) : [];
      kept.write(key, rest.length ? {...left, answers: rest} : null);
    };
    const flush = async () => {
      let problem = null;
      for (const [key, queue] of waiting()) {
        while (queue.answers.length) {
          const some = queue.answers.slice(0, BATCH);
          const response = await post("answers", {rater: queue.rater, session: queue.session, answers: some});
          if (!response.ok) { problem = new Error(await refused(response)); break; }
          sent(key, queue, some);
        }
        if (!queue.answers.length) memory.delete(key);
      }
      if (problem) throw problem;
    };
    const send = () => {
      sending = sending || flush().then(
        () => { isDown = false; report(); },
        (error) => {
          isDown = true;
          report(error instanceof TypeError || error.name === "AbortError" ? "" : error.message);
          clearTimeout(timer);
          timer = setTimeout(send, RETRY);
        },
      ).finally(() => { sending = null; });
      return sending;
    };
    addEventListener("online", send);
    const cache = new Map();
    return {
      async begin(rater) {
        await send();
        const response = await post("begin", {rater});
        if (!response.ok) throw new Error(await refused(response));
        return response.json();
      },
      async record(rater, event) {
        const key = `queue:${rater}:${session}`;
        const queue = memory.get(key) || {rater, session, answers: []};
        queue.answers.push(event);
        memory.set(key, queue);
        kept.write(key, queue);
        if (isDown) { report(); return; }
        // An answer that was put down while others were on their way follows them.
        const done = sending ? sending.then(send) : send();
        await Promise.race([done, new Promise((go) => setTimeout(go, WAIT))]);
      },
      image(id) {
        if (!cache.has(id)) {
          cache.set(id, (async () => {
            for (let wait = 300; ; wait = Math.min(2 * wait, RETRY)) {
              try {
                const response = await fetch(`image/${id}`, {credentials: "omit"});
                if (response.ok) return URL.createObjectURL(await response.blob());
                say(await refused(response));
              } catch { /* It comes again when the server is back. */ }
              await new Promise((go) => setTimeout(go, wait));
            }
          })());
        }
        return cache.get(id);
      },
      forget(wanted) {
        for (const [id, url] of cache) {
          if (!wanted.has(id)) { cache.delete(id); url.then((one) => URL.revokeObjectURL(one)); }
        }
      },
      where: "Every answer is stored at once. You can close the page and go on later, here or in another browser, under the same name.",
      done: "All answers are stored. You can close this page.",
    };
  };

  // A file keeps its answers in the browser, until they are downloaded.
  const file = () => {
    const images = JSON.parse(find("images").textContent);
    let log = null;
    const number = (name) => [...name].reduce((sum, one) => (sum * 31 + one.codePointAt(0)) % 9973, 7);
    return {
      async begin(rater) {
        log = kept.read(`answers:${rater}`) || {session: random(), answers: []};
        const last = new Map();
        for (const event of log.answers) {
          last.delete(event.item);
          if (!event.retracted) last.set(event.item, event.choice);
        }
        return {items: config.orders[number(rater) % config.orders.length], history: [...last]};
      },
      async record(rater, event) {
        log.answers.push(event);
        if (!kept.write(`answers:${rater}`, log)) say("This browser keeps nothing: download your answers before you close this page.");
      },
      image: async (id) => images[id],
      forget() {},
      save(rater) {
        const document_ = {
          format: config.format, version: config.version, design: config.design, rater, session: log.session, answers: log.answers,
        };
        const link = make("a");
        link.href = URL.createObjectURL(new Blob([JSON.stringify(document_)], {type: "application/json"}));
        link.download = `review-${config.design}-${rater}.json`;
        link.click();
        setTimeout(() => URL.revokeObjectURL(link.href), 60000);
      },
      where: "Your answers stay in this browser until you download them; send the downloaded file back to whoever gave you this one. You can close the page and go on later, in this browser, under the same name.",
      done: "Download your answers and send the file back to whoever gave you this page.",
    };
  };

  const transport = config.is_file ? file() : server();
  const state = {rater: "", items: [], answered: new Map(), history: [], current: null, before: null, isReady: false, isBusy: false, since: 0, whole: false, typed: ""};

  const imageIds = ([id]) => (isPair ? [`${id}-0`, `${id}-1`] : [id]);
  const open = () => state.items.filter(([id]) => !state.answered.has(id));

  // Answers -----------------------------------------------------------------------------------------------------------

  const answer = async (choice) => {
    if (!state.current || !state.isReady || state.isBusy) return;
    state.isBusy = true;
    const item = state.current[0];
    const seconds = Math.round(performance.now() - state.since) / 1000;
    await transport.record(state.rater, {item, choice, at: Date.now(), seconds, retracted: false});
    state.answered.set(item, choice);
    state.history.push(item);
    state.before = null;
    state.isBusy = false;
    show();
  };

  const undo = async () => {
    if (state.isBusy || !state.history.length) return;
    state.isBusy = true;
    const item = state.history.pop();
    const choice = state.answered.get(item);
    await transport.record(state.rater, {item, choice: -1, at: Date.now(), seconds: 0, retracted: true});
    state.answered.delete(item);
    state.before = choice;
    state.isBusy = false;
    show(state.items.find(([id]) => id === item));
  };

  // Images ------------------------------------------------------------------------------------------------------------

  const fit = () => {
    const stage = find("stage");
    const pictures = [...stage.querySelectorAll("img")];
    const sides = pictures.length || 1;
    const style = getComputedStyle(stage);
    const margin = 2 * parseFloat(style.paddingLeft), frame = isPair ? 12 : 0;
    const width = (stage.clientWidth - margin - parseFloat(style.columnGap) * (sides - 1)) / sides - frame;
    const height = stage.clientHeight - margin - frame;
    for (const picture of pictures) {
      const isTiny = Math.max(picture.naturalWidth, picture.naturalHeight) < TINY;
      let scale = Math.min(width / picture.naturalWidth, height / picture.naturalHeight);
      // Larger ones are hard to read as a whole; whole steps, and halves on fine screens, leave the pixels of a small image equally large.
      if (isTiny) scale = Math.min(scale, LARGE / Math.max(picture.naturalWidth, picture.naturalHeight));
      if (isTiny && scale > 1) scale = Math.floor(2 * scale) / 2;
      if (state.whole) scale = 1;
      picture.classList.toggle("tiny", isTiny);
      picture.width = Math.max(1, Math.round(picture.naturalWidth * scale));
      picture.height = Math.max(1, Math.round(picture.naturalHeight * scale));
    }
  };

  const show = async (wanted) => {
    const rest = open();
    const current = wanted || rest[0] || null;
    state.current = current;
    state.isReady = false;
    find("stage").setAttribute("aria-busy", "true");
    state.typed = "";
    const done = state.items.length - rest.length;
    find("count").textContent = `${done} of ${state.items.length}`;
    find("progress").max = state.items.length || 1;
    find("progress").value = done;
    find("undo").disabled = !state.history.length;
    find("work").hidden = !current;
    find("end").hidden = Boolean(current);
    if (!current) {
      find("stored").textContent = transport.done;
      find("save-last").focus();
      return;
    }
    find("question").textContent = isPair ? `Which is the better “${current[2]}”?` : "Which class does the image show?";
    find("stage").replaceChildren(make("span", "wait", ""));
    choices();
    const next = [current, ...rest.filter((one) => one !== current).slice(0, AHEAD)];
    transport.forget(new Set(next.flatMap(imageIds)));
    next.forEach((one) => imageIds(one).forEach((id) => transport.image(id)));
    const slow = setTimeout(() => { find("stage").firstChild.textContent = "Waiting for the image …"; }, 600);
    const pictures = await Promise.all(imageIds(current).map(async (id) => {
      const picture = make("img");
      picture.alt = "";
      picture.draggable = false;
      picture.src = await transport.image(id);
      await picture.decode().catch(() => undefined);
      return picture;
    }));
    clearTimeout(slow);
    if (state.current !== current) return;
    if (isPair) {
      const sides = current[1] ? [1, 0] : [0, 1];
      find("stage").replaceChildren(...sides.map((side, place) => {
        const button = make("button", state.before === side ? "side was" : "side");
        button.type = "button";
        button.setAttribute("aria-label", place ? "The right image" : "The left image");
        button.append(pictures[side]);
        button.addEventListener("click", () => answer(side));
        return button;
      }));
    } else {
      pictures[0].alt = "The image to be judged";
      find("stage").replaceChildren(pictures[0]);
    }
    fit();
    // The time counts from the frame that shows it.
    requestAnimationFrame(() => {
      if (state.current !== current) return;
      state.since = performance.now();
      state.isReady = true;
      find("stage").setAttribute("aria-busy", "false");
    });
    if (isTyped) find("typed").focus({preventScroll: true});
  };

  // Choices -----------------------------------------------------------------------------------------------------------

  const plain = (text) => text.normalize("NFKD").replace(/[\u0300-\u036f]/g, "").toLowerCase();
  const names = config.labels.map(plain);

  const matching = (typed) => {
    const wanted = plain(typed.trim());
    const places = names.map((_, place) => place);
    if (!wanted) return places;
    const rank = (name) => (name.startsWith(wanted) ? 0 : name.includes(` ${wanted}`) ? 1 : name.includes(wanted) ? 2 : 3);
    const ranks = names.map(rank);
    return places.filter((place) => ranks[place] < 3).sort((a, b) => ranks[a] - ranks[b] || names[a].length - names[b].length || a - b);
  };

  const button = (text, key, choice, className) => {
    const one = make("button", className);
    one.type = "button";
    if (key) one.append(make("kbd", "", key));
    one.append(make("bdi", "", text));
    one.addEventListener("click", (event) => {
      // By a pointer: the focus would take the next key.
      if (event.detail) one.blur();
      answer(choice);
    });
    if (choice === state.before) one.classList.add("was");
    return one;
  };

  const choices = () => {
    if (isPair) {
      const [left, right] = state.current[1] ? [1, 0] : [0, 1];
      find("others").replaceChildren(
        button("Left", "←", left), button("Equal, cannot tell", "↓", -1), button("Right", "→", right),
      );
      return;
    }
    const typed = find("typed").value;
    let places = isLong || isTyped ? matching(typed) : names.map((_, place) => place);
    const isFirst = Boolean(typed) && (isLong || isTyped);
    const rest = isTyped ? Math.max(0, places.length - SHOWN) : 0;
    if (isTyped) places = places.slice(0, SHOWN);
    const nodes = places.map((place, number) => {
      const one = button(config.labels[place], config.keys[place], place, isFirst && !number ? "first" : "");
      if (state.typed && !config.keys[place].startsWith(state.typed)) one.classList.add("off");
      return one;
    });
    if (rest) nodes.push(make("span", "small", `and ${rest} more: type more of the name`));
    if (!places.length) nodes.push(make("span", "small", "No class has a name like this."));
    find("choices").replaceChildren(...nodes);
    find("others").replaceChildren(button("None of these, or cannot tell", "-", -1));
  };

  const first = () => {
    const [place] = matching(find("typed").value);
    if (place === undefined || !find("typed").value.trim()) return;
    clear();
    answer(place);
  };
  const clear = () => { find("typed").value = ""; find("typed").blur(); };

  const press = (key) => {
    if (isPair) {
      const [left, right] = state.current && state.current[1] ? [1, 0] : [0, 1];
      const sides = {ArrowLeft: left, ArrowRight: right, ArrowDown: -1, "-": -1, "=": -1};
      if (key in sides) answer(sides[key]);
      return key in sides;
    }
    if (key === "-") { answer(-1); return true; }
    if (isTyped) return false;
    if (key === "/" && isLong) { find("typed").focus(); return true; }
    const typed = state.typed + key.toLowerCase();
    const place = config.keys.indexOf(typed);
    if (place >= 0) { state.typed = ""; answer(place); return true; }
    const isBeginning = config.keys.some((one) => one.startsWith(typed));
    const isKnown = isBeginning || state.typed !== "";
    state.typed = isBeginning ? typed : "";
    if (isKnown) choices();
    return isKnown;
  };

  document.addEventListener("keydown", (event) => {
    if (find("work").hidden && find("end").hidden) return;
    const isUndo = event.key === "Backspace" || (event.key === "z" && (event.ctrlKey || event.metaKey));
    if (event.altKey || ((event.ctrlKey || event.metaKey) && !isUndo)) return;
    const isInput = document.activeElement === find("typed");
    if (isInput && (find("typed").value || !(isUndo || event.key === "-" || event.key === "+"))) {
      if (event.key === "Escape") { clear(); choices(); if (isTyped) find("typed").focus(); event.preventDefault(); }
      if (event.key === "Enter" && !event.repeat && !event.isComposing) { first(); event.preventDefault(); }
      return;
    }
    if (event.repeat && !isUndo) return;
    let isTaken = true;
    if (isUndo && state.typed) { state.typed = ""; choices(); }
    else if (isUndo) undo();
    else if (event.key === "Escape") { state.typed = ""; choices(); }
    else if (event.key === "+") resize();
    else if (isTyped && !isInput && event.key.length === 1 && event.key !== "-" && event.key !== " ") { find("typed").focus(); isTaken = false; }
    else isTaken = !find("work").hidden && press(event.key);
    if (isTaken) event.preventDefault();
  });

  const resize = () => {
    state.whole = !state.whole;
    find("size").setAttribute("aria-pressed", String(state.whole));
    fit();
  };

  // Begin -------------------------------------------------------------------------------------------------------------

  const begin = async (rater) => {
    const {items, history} = await transport.begin(rater);
    state.rater = rater;
    state.items = items;
    state.answered = new Map(history);
    state.history = history.map(([item]) => item);
    try { sessionStorage.setItem(`${PREFIX}rater`, rater); } catch { /* It is asked again. */ }
    kept.write("rater", rater);
    find("who").textContent = rater;
    find("start").hidden = true;
    find("bar").hidden = false;
    show();
  };

  const start = () => {
    find("title").textContent = isPair ? "Which of two images is better?" : "Which class does an image show?";
    find("about").textContent = isPair
      ? `You will see ${plural(config.num_items, "pair")} of images and are asked which is the better one of a class: the one that more people would name so at once. Where you see no difference, say so.`
      : `You will see ${plural(config.num_items, "image")}. Choose the class that you see. Where it is none of them, or you cannot tell, say that: it is an answer, too.`;
    find("how").textContent = isPair
      ? "By keys: the arrows left and right, down for equal. Backspace takes the last answer back."
      : isTyped ? "By keys: type the beginning of a name, then Enter; - for none. Backspace takes the last answer back."
      : "By keys: each button shows its own. Backspace takes the last answer back.";
    find("where").textContent = transport.where;
    let rater = config.rater;
    try { rater = rater || sessionStorage.getItem(`${PREFIX}rater`) || ""; } catch { /* It is asked. */ }
    find("rater").value = rater || kept.read("rater") || "";
    find("rater").readOnly = Boolean(config.rater);
    find("start").hidden = false;
    find("rater").focus();
    let isSame = false;
    try { isSame = rater && sessionStorage.getItem(`${PREFIX}rater`) === rater; } catch { isSame = false; }
    if (isSame) submit();
  };

  const submit = () => {
    say("");
    begin(find("rater").value.trim()).catch((error) => {
      say(error instanceof TypeError || error.name === "AbortError" ? "The server does not answer; try again when it is back." : error.message);
    });
  };

  find("begin").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  find("rater").addEventListener("input", () => { find("rater").value = find("rater").value.toLowerCase().replace(/[ _.]/g, "-"); });
  find("undo").addEventListener("click", (event) => { if (event.detail) find("undo").blur(); undo(); });
  find("size").addEventListener("click", (event) => { if (event.detail) find("size").blur(); resize(); });
  find("typed").addEventListener("input", choices);
  for (const id of ["save", "save-last"]) {
    find(id).hidden = !config.is_file;
    find(id).addEventListener("click", () => transport.save(state.rater));
  }
  if (!isPair) {
    find("search").hidden = !(isLong || isTyped);
    find("typed").placeholder = isTyped ? "Name of the class, then Enter" : "Name of the class (key: /)";
    find("choices").classList.toggle("many", config.labels.length > 10);
  }
  new ResizeObserver(fit).observe(find("stage"));
  start();
})();
