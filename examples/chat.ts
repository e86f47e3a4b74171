// A chat with nothing but `fetch`, for Node, Deno, Bun and browsers:
//   node examples/chat.ts TEXT                                              (Node 22.18 or newer)
//   deno run --allow-net --allow-env examples/chat.ts TEXT
//   bun examples/chat.ts TEXT
// Ctrl-C stops the reply. BASE is the gateway, TOKEN a key or token for it, CHAT_USER the user who speaks.

export interface Options {
  base: string;
  user: string;
  token?: string;
  /** How many ms without a byte break a connection. The gateway sends a comment every 15 s. Default: 45 s. */
  silence?: number;
}

/** A run that has ended. */
export interface Run {
  id: string;
  status: "completed" | "incomplete" | "failed" | "cancelled" | "expired";
  error: { code: string; message: string } | null;
}

export interface Message {
  id: string;
  content: { type: string; text?: string }[];
}

export type RunEvent =
  | { name: "run.queued"; data: { run_id: string; position: number } }
  | { name: "run.started"; data: { run_id: string } }
  | { name: "message.delta"; data: { text: string } }
  | { name: "run.requires_action"; data: { run_id: string; tool_calls: unknown[] } }
  | { name: "message.completed"; data: { message: Message } }
  | { name: `run.${Run["status"]}`; data: { run: Run } };

/** An answer that is an error. Its message says how to mend the request. */
export class Problem extends Error {
  readonly status: number;
  /** The same request may succeed later, after `retryAfter` milliseconds. */
  readonly isPassing: boolean;
  readonly retryAfter?: number;

  constructor(status: number, detail: string, isPassing: boolean, retryAfter?: number) {
    super(`${status}: ${detail}`);
    this.status = status;
    this.isPassing = isPassing;
    this.retryAfter = retryAfter;
  }
}

const ATTEMPTS = 5; // in a row that bring nothing new

/** The one conversation of a user. */
export class Conversation {
  private readonly scope: string;
  private readonly options: Options;
  private readonly silence: number;
  /** The id of the run that answers. */
  run?: string;

  constructor(options: Options) {
    this.options = options;
    this.silence = options.silence ?? 45_000;
    this.scope = `${options.base}/v1/users/${encodeURIComponent(options.user)}`;
  }

  /** Sends a message once, and yields the events of its run once, whatever breaks on the way. */
  async *say(content: string, strategy = "enqueue"): AsyncGenerator<RunEvent> {
    const key = crypto.randomUUID();
    const body = JSON.stringify({ content, multitask_strategy: strategy, stream: true });
    let events: string | undefined; // where to read on
    let last: string | undefined; // id of the event that was seen last
    let failure: unknown = new Error("each stream ended before its run");
    this.run = undefined;
    for (let attempt = 1; ; attempt++) {
      let pause: number | undefined;
      try {
        const answer = events
          ? await this.call("GET", events, last ? { "last-event-id": last } : {})
          : await this.call("POST", `${this.scope}/messages`, { "idempotency-key": key }, body);
        for await (const event of serverSentEvents(answer, this.silence)) {
          if (event.name === "stream.reconnect") {
            // This replica stops, and another one continues.
            events = new URL(event.data.events, this.scope).href;
            continue;
          }
          this.run ??= event.data.run_id as string;
          events ??= `${this.scope}/runs/${this.run}/events`;
          last = event.id;
          attempt = 0;
          yield event as RunEvent;
          if (event.data.run) return;
        }
      } catch (error) {
        failure = error; // broken, or silent for too long
        if (error instanceof Problem) {
          if (!error.isPassing) throw error;
          pause = error.retryAfter;
        }
      }
      if (attempt >= ATTEMPTS) throw failure;
      await sleep(pause ?? (250 + 250 * Math.random()) * 2 ** attempt);
    }
  }

  /** Ends the run that answers; its stream tells the end. The text so far stays in the transcript. */
  async cancel(): Promise<void> {
    await this.call("POST", `${this.scope}/runs/${this.run}/cancel`);
  }

  private async call(method: string, url: string, headers: Record<string, string> = {}, body?: string) {
    const { token } = this.options;
    const sent = {
      ...headers,
      ...(token && { authorization: `Bearer ${token}` }),
      ...(body && { "content-type": "application/json" }),
    };
    const late = new AbortController();
    const head = fetch(url, { method, headers: sent, body, signal: late.signal });
    const answer = await within(this.silence, head, () => late.abort());
    if (!answer.ok) throw await problemOf(answer);
    return answer;
  }
}

const sleep = (ms: number) => new Promise<void>((wake) => setTimeout(wake, ms));

async function within<T>(ms: number, promise: Promise<T>, giveUp: () => unknown): Promise<T> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => {
      reject(new Error(`no byte for ${ms / 1000} s`));
      giveUp();
    }, ms);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

async function problemOf(answer: Response): Promise<Problem> {
  const problem = await answer.json().catch(() => ({})); // `{}`: not the gateway's answer
  const after = answer.headers.get("retry-after");
  // A problem with a run tells how the run ended: there is nothing to wait for.
  const isPassing = [429, 502, 503].includes(answer.status) && !problem.run_id;
  const retryAfter = after ? 1000 * Number(after) : undefined;
  return new Problem(answer.status, problem.detail ?? answer.statusText, isPassing, retryAfter);
}

async function* serverSentEvents(answer: Response, silence: number) {
  const reader = answer.body!.pipeThrough(new TextDecoderStream()).getReader();
  const leave = () => reader.cancel().catch(() => {});
  try {
    for (let text = ""; ; ) {
      const { value, done } = await within(silence, reader.read(), leave);
      if (done) return;
      const blocks = (text + value).split("\n\n");
      text = blocks.pop()!;
      for (const block of blocks) {
        const field = (name: string) => block.match(new RegExp(`^${name}: ?(.*)$`, "m"))?.[1];
        const data = field("data"); // the gateway writes it on one line
        if (data) yield { id: field("id"), name: field("event")!, data: JSON.parse(data) };
      }
    }
  } finally {
    leave();
  }
}

// As a program, in Node, Deno or Bun.
const program = (globalThis as any).process;
if (/chat\.[jt]s$/.test(program?.argv?.[1] ?? "")) {
  const { BASE = "http://127.0.0.1:8080", TOKEN, CHAT_USER = "example", SILENCE } = program.env;
  const silence = SILENCE && 1000 * SILENCE;
  const chat = new Conversation({ base: BASE, user: CHAT_USER, token: TOKEN, silence });
  program.on("SIGINT", () => (chat.run ? chat.cancel().catch(console.error) : program.exit(130)));
  try {
    for await (const event of chat.say(program.argv.slice(2).join(" "))) {
      if (event.name === "run.queued") console.error(`(place ${event.data.position} in the queue)`);
      if (event.name === "message.delta") program.stdout.write(event.data.text);
      if ("run" in event.data) {
        const { status, error } = event.data.run;
        console.log();
        if (status !== "completed") console.error(`(${status}) ${error?.message ?? ""}`);
        program.exitCode = status === "completed" ? 0 : 1;
      }
    }
  } catch (error) {
    console.error(error instanceof Problem ? error.message : `${BASE}: ${(error as Error).cause ?? error}`);
    program.exitCode = 1;
  }
}
