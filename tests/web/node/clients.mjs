// Calls every RPC with one client of other projects, and prints what each answered as a line of JSON.
// Usage: node clients.mjs URL DESCRIPTOR_SET CLIENT

import { readFileSync } from "node:fs";
import { createFileRegistry, create, fromBinary, fromJson, toBinary, toJson } from "@bufbuild/protobuf";
import { FileDescriptorSetSchema } from "@bufbuild/protobuf/wkt";
import { createClient } from "@connectrpc/connect";
import * as overNode from "@connectrpc/connect-node";
import * as overFetch from "@connectrpc/connect-web";
import grpcWeb from "grpc-web";
import xhr2 from "xhr2";

const [url, descriptorSet, clientName] = process.argv.slice(2);
const files = createFileRegistry(fromBinary(FileDescriptorSetSchema, readFileSync(descriptorSet)));
const service = files.getService("jobstatus.v1.JobStatusService");

const options = { baseUrl: url, httpVersion: "1.1" };
const transports = {
  "connect-node json": () => overNode.createConnectTransport({ ...options, useBinaryFormat: false }),
  "connect-node binary gzip": () =>
    overNode.createConnectTransport({
      ...options, useBinaryFormat: true, sendCompression: overNode.compressionGzip, compressMinBytes: 1,
    }),
  "connect-node grpc-web": () => overNode.createGrpcWebTransport(options),
  "connect-web json": () => overFetch.createConnectTransport({ ...options, useBinaryFormat: false }),
  "connect-web binary": () => overFetch.createConnectTransport({ ...options, useBinaryFormat: true }),
  "connect-web grpc-web": () => overFetch.createGrpcWebTransport(options),
};

// The client of the gRPC project, with the serializers of protobuf-es.
function grpcWebClient(format) {
  globalThis.XMLHttpRequest = xhr2.XMLHttpRequest;
  const base = new grpcWeb.GrpcWebClientBase({ format });
  const info = (method) =>
    new grpcWeb.MethodDescriptor(
      `/${service.typeName}/${method.name}`, method.methodKind, Object, Object,
      (message) => toBinary(method.input, message), (bytes) => fromBinary(method.output, bytes),
    );
  const client = {};
  for (const method of service.methods) {
    const path = `${url}/${service.typeName}/${method.name}`;
    if (method.methodKind === "unary")
      client[method.localName] = (request) =>
        base.unaryCall(path, create(method.input, request), {}, info(method));
    else
      client[method.localName] = async function* (request) {
        const queue = [];
        let wake = () => {};
        const stream = base.serverStreaming(path, create(method.input, request), {}, info(method));
        const put = (item) => { queue.push(item); wake(); };
        stream.on("data", (message) => put({ message }));
        stream.on("error", (error) => put({ error }));
        stream.on("end", () => put({}));
        try {
          for (;;) {
            while (!queue.length) await new Promise((resolve) => { wake = resolve; });
            const { message, error } = queue.shift();
            if (error) throw error;
            if (!message) return;
            yield message;
          }
        } finally {
          stream.cancel();
        }
      };
  }
  return client;
}

const client =
  clientName === "grpc-web text" ? grpcWebClient("text")
  : clientName === "grpc-web binary" ? grpcWebClient("binary")
  : createClient(service, transports[clientName]());

const print = (name, answer) => console.log(JSON.stringify({ name, answer }));
const schemaOf = (name) => service.methods.find((method) => method.name === name);

async function unary(name, request) {
  const method = schemaOf(name);
  const reply = await client[method.localName](fromJson(method.input, request));
  print(name, toJson(method.output, reply));
}

async function stream(name, request, isLast = () => false) {
  const method = schemaOf(name);
  for await (const message of client[method.localName](fromJson(method.input, request))) {
    const answer = toJson(method.output, message);
    print(name, answer);
    if (isLast(answer)) break;
  }
}

const id = `of ${clientName}`.replaceAll(" ", "-");
await unary("CreateJob", { job: { id, name: "büro", labels: { team: "a" } } });
await unary("GetJob", { id });
await unary("UpdateJob", { job: { id, state: "JOB_STATE_IN_PROGRESS" }, attempt: 1 });
await unary("BatchUpdateJobs", { updates: [{ job: { id, progress: 41.5 }, attempt: 1 }] });
await unary("CancelJob", { id, reason: "no longer needed" });
// Under grpc-web, XMLHttpRequest of Node passes on no part of a response before its end, and WatchJobs has none.
if (!clientName.startsWith("grpc-web"))
  await stream("WatchJobs", { filter: { ids: [id] } }, (answer) =>
    answer.events.some((event) => event.type === "JOB_EVENT_TYPE_SYNCED"));
const watching = stream("WatchJob", { id, minUpdateInterval: "0s" });
await unary("UpdateJob", { job: { id, state: "JOB_STATE_SUCCEEDED", result: { bytes: 12 } }, attempt: 1 });
await watching;
await unary("ListJobs", { filter: { ids: [id] } });
await unary("ListJobTransitions", { id });
await unary("GetCallerIdentity", {});
await unary("DeleteJob", { id });
try {
  await unary("GetJob", { id });
} catch (error) {
  const details = error.metadata?.["grpc-status-details-bin"] ?? error.details?.map((each) => each.type).join();
  print("error", { code: error.code, message: error.rawMessage ?? error.message, details: details ?? null });
}
process.exit(0);
