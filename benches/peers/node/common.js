// What the programs of this folder share. Each is called as `node PEER.js WORK URL COUNT`:
//
//   drain    stores COUNT jobs, then handles them; prints how many a second it handled.
//   publish  stores COUNT jobs from 32 callers, each waiting for its own; prints how many a second.
//   pace     stores COUNT jobs, 50 a second, each with the time at which it was sent.
//   work     handles COUNT jobs of `pace`, printing `ready` first and then for each the milliseconds from sent to handled.

import { setTimeout as sleep } from "node:timers/promises";

export const CALLERS = 32;

/** About 300 bytes of JSON, as an order would have. */
export const payload = () => ({
  order_id: "o-100017",
  customer: "c-1017",
  total_cents: 4599,
  currency: "EUR",
  note: "x".repeat(180),
  lines: 3,
});

/** Milliseconds of the clock that all processes of a machine share. */
const now = () => Number(process.hrtime.bigint()) / 1e6;

/** Stores `count` jobs in batches. */
export async function fill(count, store) {
  const batch = 1_000;
  for (let done = 0; done < count; done += batch) {
    await store(Array.from({ length: Math.min(batch, count - done) }, payload));
  }
}

/** Calls `store` from 32 callers, `count` times in all. Answers how many a second. */
export async function callers(count, store) {
  const began = now();
  const caller = async () => {
    for (let n = 0; n < count / CALLERS; n++) await store(payload());
  };
  await Promise.all(Array.from({ length: CALLERS }, caller));
  return (count * 1e3) / (now() - began);
}

/** Calls `store` 50 times a second, whether or not the last has been answered. */
export async function pace(count, store) {
  const began = now();
  const stored = [];
  for (let n = 0; n < count; n++) {
    await sleep(Math.max(0, began + n * 20 - now()));
    stored.push(store({ ...payload(), sent: now() }));
  }
  await Promise.all(stored);
}

/** Counts calls, and says when there were `count` of them. */
export function counter(count) {
  const { promise, resolve } = withResolvers();
  let calls = 0;
  const call = () => {
    if (++calls === count) resolve();
  };
  return { call, all: promise };
}

/** Notes how long jobs took from sent to here. */
export function watch(count) {
  const { call, all } = counter(count);
  const times = [];
  const handled = (job) => {
    times.push(now() - job.sent);
    call();
  };
  return { handled, all: all.then(() => times) };
}

function withResolvers() {
  let resolve;
  const promise = new Promise((resolved) => (resolve = resolved));
  return { promise, resolve };
}

/** Times `work`, which handles `count` jobs. */
export async function rate(count, work) {
  const began = now();
  await work();
  return (count * 1e3) / (now() - began);
}

/** Runs what the command line asks for. */
export async function run(works) {
  const [work, url, count] = process.argv.slice(2);
  if (!Object.hasOwn(works, work)) throw new Error(`one of ${Object.keys(works)}, not ${work}`);
  const answer = await works[work](url, Number(count));
  if (answer !== undefined) console.log([answer].flat().join("\n"));
  process.exit(0);
}

export const ready = () => console.log("ready");
