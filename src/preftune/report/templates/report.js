"use strict";
// Search and filters of the explorers. The page says everything without this; nothing is fetched, nothing stored.
const unfold = () => {
  const asked = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const part = asked && asked.querySelector("details.part");
  if (part) part.open = true;
};
window.addEventListener("hashchange", unfold);
unfold();
for (const box of document.querySelectorAll(".explorer")) {
  const tools = box.querySelector(".tools");
  const cards = [...box.querySelectorAll(".card")];
  const field = (name) => tools.querySelector(`[data-is="${name}"]`);
  const [find, tag, by, from, to, count] = ["find", "tag", "by", "from", "to", "count"].map(field);
  const words = new Map();
  const text = (card) => {
    if (!words.has(card)) words.set(card, card.textContent.toLowerCase());
    return words.get(card);
  };
  const limit = (input, none) => (input.value.trim() === "" || Number.isNaN(input.valueAsNumber) ? none : input.valueAsNumber);
  const scored = (card, low, high) => {
    if (low === -Infinity && high === Infinity) return true;
    const all = card.dataset.values.split(" ");
    const asked = by && by.value !== "" ? [all[Number(by.value)]] : all;
    return asked.some((value) => value !== "-" && Number(value) >= low && Number(value) <= high);
  };
  const PAGE = 20;
  let room = PAGE;
  const apply = () => {
    const sought = find.value.trim().toLowerCase();
    const low = limit(from, -Infinity), high = limit(to, Infinity);
    let fitting = 0, shown = 0;
    for (const card of cards) {
      const fits = (sought === "" || text(card).includes(sought))
        && (!tag || tag.value === "" || card.dataset.tags.split(" ").includes(tag.value))
        && scored(card, low, high);
      card.hidden = !fits || fitting >= room;
      fitting += fits ? 1 : 0;
      shown += card.hidden ? 0 : 1;
    }
    field("more").hidden = shown === fitting;
    count.textContent = `${shown} of ${fitting} shown${fitting < cards.length ? `, ${cards.length} in all` : ""}`;
  };
  const open = (state) => cards.forEach((card) => { card.open = state && !card.hidden; });
  for (const input of [find, tag, by, from, to]) if (input) input.addEventListener("input", () => { room = PAGE; apply(); });
  field("more").addEventListener("click", () => { room += PAGE; apply(); });
  field("open").addEventListener("click", () => open(true));
  field("close").addEventListener("click", () => open(false));
  field("clear").addEventListener("click", () => {
    for (const input of [find, tag, by, from, to]) if (input) input.value = "";
    apply();
  });
  cards.forEach((card, place) => { card.open = place < 3; });
  tools.hidden = false;
  apply();
}
