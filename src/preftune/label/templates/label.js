"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  const verdicts = [...document.querySelectorAll("[data-verdict]")];
  const words = { a: "A is better", b: "B is better", tie: "tie", bad: "both bad", skip: "skipped" };
  let state = null, busy = false, shownAt = 0;

  // Drawn here, once for each click: what is sent twice is kept once.
  function drawn() {
    return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  }

  function element(name, text, kind) {
    const made = document.createElement(name);
    made.textContent = text;
    if (kind) made.className = kind;
    return made;
  }

  function trouble(text) {
    at("trouble").hidden = !text;
    at("trouble").textContent = text;
  }

  // --- where judgements go: a server --------------------------------------------------------------------

  function server() {
    const token = location.hash.slice(1);
    const place = "preftune-label-" + token.slice(0, 8); // of what was clicked and is not known to be saved
    const pause = () => new Promise((done) => setTimeout(done, 1000));

    async function ask(path, body) {
      const headers = { Authorization: "Bearer " + token };
      if (body) headers["Content-Type"] = "application/json";
      for (;;) {
        let answer = null;
        try {
          answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
        } catch {
          trouble((body ? "Not saved yet: " : "") + "the server does not answer. Trying again …");
        }
        if (answer && answer.status < 500) {
          const found = await answer.json();
          if (!answer.ok && answer.status !== 409) throw new Error(found.error);
          trouble(answer.status === 409 ? "This item was judged in another tab." : "");
          return found;
        }
        if (answer) trouble("Not saved yet: the server has failed. Is its disk full? Trying again …");
        await pause();
      }
    }

    async function send(path, body) {
      try { localStorage.setItem(place, JSON.stringify([path, body])); } catch { /* no storage: only a closed tab forgets */ }
      const found = await ask(path, body).finally(() => { try { localStorage.removeItem(place); } catch { /* as above */ } });
      return found;
    }

    return {
      async load() {
        let left = null;
        try { left = JSON.parse(localStorage.getItem(place)); } catch { /* as above */ }
        return left ? send(left[0], left[1]).catch(() => ask("/api/state")) : ask("/api/state");
      },
      judge: (said) => send("/api/judge", said),
      undo: (of) => send("/api/undo", { id: drawn(), of }),
    };
  }

  // --- or this file, whose results are saved as another one ---------------------------------------------

  function file(data) {
    const place = "preftune-label-" + data.set + "-" + data.rater;
    let kept = [];
    const before = new Map();
    function keep() {
      try { localStorage.setItem(place, JSON.stringify(kept)); } catch {
        trouble("This browser keeps nothing for files: save the results file before you close the page.");
      }
    }
    function now() {
      const done = new Set(kept.map((said) => said.slot));
      const slot = data.slots.find((each) => !done.has(each.key)) || null;
      return { rater: data.rater, done: kept.length, total: data.slots.length, tags: data.tags, slot,
        last: kept.length ? kept[kept.length - 1].id : null, before: (slot && before.get(slot.key)) || null };
    }
    // The reader takes these words for numbers unless a backslash stands before them.
    const plain = (text) => (/^\\*(NaN|-?Infinity)$/.test(text) ? "\\" + text : text);
    at("save").hidden = false;
    at("save").addEventListener("click", () => {
      const judgements = kept.map((said) => ({ ...said, note: plain(said.note), corrected: plain(said.corrected) }));
      const text = JSON.stringify({ set: data.set, rater: data.rater, judgements });
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
      link.download = "judgements-" + data.rater + ".json";
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
      at("said").textContent = "Saved " + kept.length + " judgements as " + link.download;
    });
    return {
      async load() {
        try { kept = JSON.parse(localStorage.getItem(place)) || []; } catch { kept = []; }
        return now();
      },
      async judge(said) { kept.push(said); keep(); return now(); },
      async undo() { const last = kept.pop(); before.set(last.slot, last); keep(); return now(); },
    };
  }

  const backend = at("data") ? file(JSON.parse(at("data").textContent)) : server();

  // --- what is seen -------------------------------------------------------------------------------------

  function show(next, said) {
    state = next;
    if (state.results) return showResults(state.results);
    at("count").textContent = state.done + " of " + state.total;
    at("bar").max = Math.max(state.total, 1);
    at("bar").value = state.done;
    at("tools").hidden = at("undo").hidden = false;
    at("undo").setAttribute("aria-disabled", String(!state.last));
    at("task").hidden = !state.slot;
    at("finished").hidden = Boolean(state.slot);
    at("said").textContent = (said ? said + ". " : "") + at("count").textContent + " judged.";
    if (!state.slot) {
      at("after").textContent = at("data") ? "Save the results file and send it back." : "You can close this page.";
      if (said) at("finished-title").focus();
      return;
    }
    const who = { user: "User", assistant: "Assistant", system: "System" };
    at("prompt").replaceChildren(...state.slot.prompt.map((turn) => {
      const row = document.createElement("li");
      const text = element("p", turn.text, "text");
      text.dir = "auto";
      row.append(element("strong", who[turn.role] || turn.role), text);
      return row;
    }));
    at("prompt").scrollTop = at("prompt").scrollHeight;
    at("a").textContent = state.slot.a;
    at("b").textContent = state.slot.b;
    fill(state.before || { verdict: "", tags: [], note: "", corrected: "" });
    scrollTo(0, 0);
    if (said) at("prompt-title").focus({ preventScroll: true });
    shownAt = performance.now();
  }

  function fill(before) {
    at("tags").hidden = !state.tags.length;
    at("tags").replaceChildren(element("legend", "Reasons"), ...state.tags.map((tag) => {
      const label = document.createElement("label"), box = document.createElement("input");
      box.type = "checkbox";
      box.value = tag;
      box.checked = before.tags.includes(tag);
      label.append(box, tag);
      return label;
    }));
    at("note").value = before.note;
    at("corrected").value = before.corrected;
    for (const button of verdicts) button.classList.toggle("was", button.dataset.verdict === before.verdict);
  }

  function table(place, headers, rows) {
    const head = document.createElement("tr"), body = document.createElement("tbody");
    head.append(...headers.map((text) => { const cell = element("th", text); cell.scope = "col"; return cell; }));
    for (const row of rows) {
      const line = document.createElement("tr"), first = element("th", row[0]);
      first.scope = "row";
      line.append(first, ...row.slice(1).map((text) => element("td", text)));
      body.append(line);
    }
    const top = document.createElement("thead");
    top.append(head);
    place.replaceChildren(top, body);
  }

  function showResults(found) {
    at("title").textContent = "Judgements of " + found.set;
    document.title = at("title").textContent + " · preftune";
    at("count").textContent = found.items + " items";
    at("bar").hidden = true;
    at("results").hidden = false;
    table(at("table"), found.headers, found.rows);
    table(at("raters"), ["Rater", "Judged", "Again"], found.raters);
    at("notes").replaceChildren(...found.notes.map((note) => element("p", note)));
  }

  // --- what is done -------------------------------------------------------------------------------------

  async function during(work) {
    if (busy) return;
    busy = true;
    for (const button of [...verdicts, at("undo")]) button.setAttribute("aria-disabled", "true");
    try { await work(); } catch (error) { trouble(error.message); } finally {
      busy = false;
      for (const button of verdicts) button.setAttribute("aria-disabled", "false");
      at("undo").setAttribute("aria-disabled", String(!(state && state.last)));
    }
  }

  function judge(verdict) {
    if (!state || !state.slot) return;
    during(async () => {
      const tags = [...at("tags").querySelectorAll("input:checked")].map((box) => box.value);
      const seconds = Math.round(performance.now() - shownAt) / 1000;
      const said = { id: drawn(), slot: state.slot.key, verdict, tags, note: at("note").value.trim(),
        corrected: at("corrected").value.trim(), seconds: Math.min(seconds, 1e6) };
      show(await backend.judge(said), "Saved: " + words[verdict]);
    });
  }

  function undo() {
    if (state && state.last) during(async () => show(await backend.undo(state.last), "Taken back"));
  }

  for (const button of verdicts) button.addEventListener("click", () => judge(button.dataset.verdict));
  at("undo").addEventListener("click", undo);
  at("again").addEventListener("click", () => during(async () => {
    showResults((await backend.load()).results);
    at("when").textContent = "Looked at " + new Date().toLocaleTimeString();
  }));
  const keys = { a: "a", b: "b", t: "tie", x: "bad", s: "skip" };
  document.addEventListener("keydown", (event) => {
    const writing = event.target instanceof Element && event.target.closest("textarea, select, input[type=text]");
    if (!at("keys").checked || event.repeat || event.ctrlKey || event.metaKey || event.altKey || writing) return;
    const key = event.key.toLowerCase();
    if (key === "u") undo();
    else if (Object.hasOwn(keys, key)) judge(keys[key]);
  });

  addEventListener("hashchange", () => location.reload());
  during(async () => show(await backend.load(), ""));
})();
