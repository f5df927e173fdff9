// A client of dspex that shares no code with it: submits, asks, reads results, scores, reads the log, discovers.
// Run: node client.mjs <url>; it prints one JSON object with what it saw.

import { connect, headers } from "@nats-io/transport-node";
import { jetstream } from "@nats-io/jetstream";

const nc = await connect({ servers: process.argv[2] });
const js = jetstream(nc);
const seen = {};

// Submit: publish, stored; the acknowledgement's sequence is the task's id.
const ack = await js.publish("dspex.task.nap", JSON.stringify({ n: 41 }));
seen.submitted = { stream: ack.stream, task: ack.seq };

// Submit with a key, twice: one run.
const keyed = headers();
keyed.set("Dspex-Key", "from-javascript");
seen.keyed = [];
for (let i = 0; i < 2; i++) {
  seen.keyed.push((await js.publish("dspex.task.nap", JSON.stringify({ n: i }), { headers: keyed })).seq);
}

// Read results: by id, by key, of an unknown task.
const result = async (task) => {
  const reply = await nc.request("dspex.result.nap", String(task), { timeout: 30000 });
  return { body: reply.json(), task: reply.headers?.get("Dspex-Task"), code: reply.headers?.get("Nats-Service-Error-Code") };
};
seen.result = await result(ack.seq);
seen.byKey = [await result("from-javascript"), await result(seen.keyed[1])];
seen.unknown = await result(999999);

// Ask: request, run and wait; a good one and a bad one.
const ask = async (body) => {
  const reply = await nc.request("dspex.ask.nap", body, { timeout: 30000 });
  return {
    body: reply.json(), task: reply.headers?.get("Dspex-Task"),
    code: reply.headers?.get("Nats-Service-Error-Code"), error: reply.headers?.get("Nats-Service-Error"),
  };
};
seen.asked = await ask(JSON.stringify({ n: 7 }));
seen.refused = await ask(JSON.stringify({ n: "seven" }));
seen.rubbish = await ask("{");

// A program that is not there.
try {
  await nc.request("dspex.ask.nobody", "{}", { timeout: 5000 });
} catch (error) {
  seen.nobody = { name: error.name, message: error.message };
}
try {
  await js.publish("dspex.task.nobody", "{}", { retries: 0, timeout: 5000 });
} catch (error) {
  seen.nowhere = { name: error.name, message: error.message };
}

// Score the task, then read its story from the log.
const score = { task: ack.seq, score: 0.75, feedback: "from JavaScript" };
seen.scored = (await js.publish("dspex.outcome.nap", JSON.stringify(score))).seq;
const read = async (query) => (await nc.request("dspex.log.read", JSON.stringify(query), { timeout: 10000 })).json();
seen.story = (await read({ task: ack.seq })).events;
seen.page = await read({ after: ack.seq - 1, limit: 3 });
seen.head = (await nc.request("dspex.log.head", "", { timeout: 10000 })).json();

// Discover, as ADR-32 says.
const gather = async (verb) => {
  const answers = [];
  for await (const message of await nc.requestMany(`$SRV.${verb}`, "", { strategy: "stall", stall: 500, maxWait: 5000 })) {
    answers.push(message.json());
  }
  return answers;
};
seen.ping = await gather("PING");
seen.info = await gather("INFO.nap");

await nc.drain();
console.log(JSON.stringify(seen));
