// A worker and a watcher of one job. Usage: node worker.js HOST:PORT [SECONDS_PER_STEP]
'use strict';

const assert = require('node:assert');
const { randomUUID } = require('node:crypto');
const fs = require('node:fs');
const path = require('node:path');
const { setTimeout: sleep } = require('node:timers/promises');
const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');

const PROTOS = ['jobstatus/v1/job_status.proto', 'google/rpc/status.proto', 'google/rpc/error_details.proto'];
const loaded = protoLoader.loadSync(PROTOS, {
  includeDirs: [path.join(__dirname, '../../protos'), path.join(__dirname, '../protos')],
  defaults: true, // set unset fields to their defaults
  enums: String,
  longs: Number,
  json: true, // decode google.protobuf.Any
});
const { JobStatusService } = grpc.loadPackageDefinition(loaded).jobstatus.v1;

const [address, secondsPerStep = '0.1'] = process.argv.slice(2);

// TLS, with the CA and the client's certificate and key (PEM) that the environment names, and the caller's token.
const { JOBSTATUS_CA: ca, JOBSTATUS_CERT: cert, JOBSTATUS_KEY: key, JOBSTATUS_TOKEN: token } = process.env;
const read = (file) => (file ? fs.readFileSync(file) : null);
const credentials = ca
  ? grpc.credentials.createSsl(read(ca), read(key), read(cert))
  : grpc.credentials.createInsecure();
const IS_LOOPBACK = /^(localhost|127(\.\d+){3}|\[::1\]):\d+$/;
assert(!token || ca || IS_LOOPBACK.test(address), 'a token without TLS is for loopback only: set JOBSTATUS_CA');

const client = new JobStatusService(address, credentials, {
  'grpc.keepalive_time_ms': 20_000, // detects that the server's machine is down
  'grpc.service_config': fs.readFileSync(path.join(__dirname, '../service_config.json'), 'utf8'), // gRPC retries
});
// Returns the metadata of a call. grpc-js uses the retryPolicy of the service config, but not its waitForReady.
function metadata() {
  const made = new grpc.Metadata({ waitForReady: true });
  if (token) made.set('authorization', `Bearer ${token}`);
  return made;
}

// UNAVAILABLE, DEADLINE_EXCEEDED: the server cannot be reached. CANCELLED: the server was shutting down when the call
// arrived (this program cancels no calls).
const AWAY = [grpc.status.UNAVAILABLE, grpc.status.DEADLINE_EXCEEDED, grpc.status.CANCELLED];

// Retries a call, with backoff and jitter, however long the server is away.
async function untilReachable(attempt) {
  for (let pause = 100; ; pause = Math.min(2 * pause, 10_000)) {
    const begunAt = Date.now();
    try {
      return await attempt();
    } catch (error) {
      if (!AWAY.includes(error.code)) throw error;
    }
    if (Date.now() - begunAt > 10_000) pause = 100; // reset after a call that ran for long
    await sleep(Math.random() * pause);
  }
}

// Makes one call, with retries; resolves to the job in its response.
function call(method, request) {
  return untilReachable(() => new Promise((resolve, reject) => {
    const options = { deadline: Date.now() + 10_000 };
    client[method](request, metadata(), options, (error, reply) => (error ? reject(error) : resolve(reply.job)));
  }));
}

// Returns the machine-readable reason of an error, from google.rpc.ErrorInfo in the trailer grpc-status-details-bin.
function reasonOf(error) {
  const [bytes] = error.metadata.get('grpc-status-details-bin');
  const { details } = loaded['google.rpc.Status'].deserialize(bytes);
  return details.find((detail) => detail['@type'].endsWith('/google.rpc.ErrorInfo')).reason;
}

// Prints each new state of a job until it is done. To resume an interrupted watch, it calls again.
async function watch(id, onFirst) {
  let job = {};
  await untilReachable(async () => {
    for await (const { event } of client.watchJob({ id }, metadata())) {
      if (event.job.state !== job.state) console.log(`watch: ${event.job.state}`);
      job = event.job;
      onFirst();
    }
  });
  assert(job.done, 'the watch ended with OK before the job was done');
}

async function main() {
  // The request_id makes a retry safe: the job is created once.
  const creation = { job: { name: 'import customers', heartbeatTimeout: { seconds: 60 } }, requestId: randomUUID() };
  const { id, state } = await call('createJob', creation);
  console.log(`job: ${id}`);
  console.log(`created: ${state}`);
  assert.equal((await call('createJob', creation)).id, id);
  console.log('created again: the same job');

  // A claim names the attempt that it starts. Later updates name that attempt, so a stale worker cannot write.
  const claim = { job: { id, state: 'JOB_STATE_IN_PROGRESS' }, attempt: 1, requestId: randomUUID() };
  const { state: claimed, attempt } = await call('updateJob', claim);
  console.log(`claimed: ${claimed}, attempt ${attempt}`);

  let watching;
  await new Promise((resolve, reject) => {
    watching = watch(id, resolve);
    watching.catch(reject);
  });

  // Of two claims of one attempt, only the first succeeds. This is the second.
  const refusal = await call('updateJob', { ...claim, requestId: randomUUID() }).catch((error) => error);
  assert.equal(refusal.code, grpc.status.FAILED_PRECONDITION);
  console.log(`second claim: ${reasonOf(refusal)}`);

  let end = 'JOB_STATE_SUCCEEDED';
  let step = 0;
  while (step < 3 && end === 'JOB_STATE_SUCCEEDED') {
    await sleep(Number(secondsPerStep) * 1000); // the work
    step += 1;
    const job = await call('updateJob', { job: { id, progress: 25 * step }, attempt });
    console.log(`progress: ${job.progress}`);
    if (job.cancelRequested) end = 'JOB_STATE_CANCELLED';
  }
  const result = { fields: { steps: { numberValue: step } } };
  const ended = await call('updateJob', { job: { id, state: end, result }, attempt });
  console.log(`ended: ${ended.state}, progress ${ended.progress}`);
  await watching;

  const unknown = await call('getJob', { id: 'no-such-job' }).catch((error) => error);
  assert.equal(unknown.code, grpc.status.NOT_FOUND);
  console.log(`unknown job: ${reasonOf(unknown)}`);
  client.close();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
