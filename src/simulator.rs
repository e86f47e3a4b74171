//! A simulated upstream that speaks both protocols on one port, for development, demos, tests and
//! benches.
//!
//! It enforces the known rules of the protocols: one run for each thread, state transitions,
//! expiry, closed request schemas, limits, event order. A reply repeats the user's text and counts
//! the user's messages, so that a reader can check what the server knew. On this page a *run* is
//! an Assistants run or a response.
//!
//! [`SimulatorConfig`] has the settings for all runs. Directives in the user's text, or in a
//! function's output, steer a single run: `[[sim: … ]]`, with several words in one or several
//! brackets. The reply does not repeat them:
//!
//! | Directive | The run |
//! |---|---|
//! | `tool=NAME` (repeatable), `tools=N` | calls functions before it replies |
//! | `tool=mcp_approval:NAME` | asks for an approval before it replies |
//! | `tool=TYPE:NAME` | calls a `custom`, `computer`, `local_shell`, `shell` or `apply_patch` tool (responses only) |
//! | `forget` | ignores `previous_response_id` (responses only, as a fault) |
//! | `gone` | is refused, because its thread, conversation or previous response is lost from now on (as a fault) |
//! | `poison`, `poison=CODE` | replies, and refuses later runs whose history has the message and its reply |
//! | `fail`, `incomplete` | ends `failed` (`server_error`), or `incomplete` after half of the text |
//! | `fail=CODE` (`retry_after=1`) | ends `failed` with this code before its first word |
//! | `empty` | completes without any output |
//! | `fail_text=open_call`, `fail_text=reasoning` | is accepted, then ends `failed` with only the message for a damaged conversation; as a fault it replaces the refusal (responses only) |
//! | `refusal`, `reasoning`, `parts=N` | refuses; reasons first (responses only); replies in N messages |
//! | `dangling_reasoning` | leaves a reasoning item without a successor, so that the next run is refused (responses only) |
//! | `stuck_cancel` | accepts a cancel that never takes effect: the run stays `cancelling`, or the cancel call of a response gets no answer |
//! | `latency=500ms`, `rate=20ms`, `tokens=50` | waits this long before its first token, and between two tokens; has at least this many words |
//! | `status=429`, `code=…`, `retry_after=2` | is not accepted: an HTTP error |
//! | `wording=FORM` | as a fault, words the error of `status` as a foreign server does: a page (`html`), a framework's "Not Found" (`detail`), a text with the requested id (`named`), the protocol's error wrapped by a relay (`relayed`), a text in the place of the error (`string`) |
//! | `hostile=KIND` (`rate`, `status`, `location=URL`) | is not accepted: the answer is hostile, see below |
//! | `drop=before`, `drop=after` | the connection closes without an answer, before or after the run was accepted |
//! | `silent`, `silent_after=N` | is accepted, then nothing is sent, or nothing after N deltas |
//! | `hold_after=N` | a hold takes effect after N deltas, not before the first one |
//! | `cut=N` | the connection breaks after N deltas |
//! | `chance=30` | the directives apply to 30 of 100 requests, at random |
//! | `late_head=2s` | is accepted and works, but the head of its answer is held back for this time |
//! | `mid_error`, `mid_error=nested`, `mid_error=bare` | sends an `error` event after the first deltas: flat, nested, or nested without naming its type; the run fails |
//! | `bare_error=FORM` | is not accepted, but the answer has status 200 and the error (`code=…`, `error_type=…`) in its body: `data: {"error": {…}}` (`object`), the same and `data: [DONE]` (`done`), `data: {"error": "…"}` (`string`), `data: {"message": …}` (`flat`), `data: {"detail": …}` (`detail`), JSON in an event stream (`line`), or JSON in the place of an event stream (`json`) |
//! | `no_terminal` | the stream ends properly but without its last events |
//! | `two_ends` | the stream has its last event twice |
//! | `unreadable` | the stream has an event after the second delta whose JSON is cut off |
//! | `halves` | the reply ends with a character that is cut in two halves, each in a delta of its own |
//! | `crlf`, `no_event_lines`, `split`, `comments`, `unknown_events` | the stream is written so (`no_event_lines`: responses only; `split`: in chunks of 1 to 3 bytes) |
//!
//! The same words make up a [`Fault`], which waits for the next matching requests whatever their
//! content. For operations that start no run, these apply: `status` (with `code`, `retry_after`,
//! `wording`), `hostile`, `bare_error`, `drop`, `silent` and `latency`.
//!
//! A hostile answer has status 200, or that of `status`. It is generated while the client reads,
//! and ends when the client leaves:
//!
//! | Kind | As a stream | As JSON |
//! |---|---|---|
//! | `endless_line` | a line that never ends | a text that never ends |
//! | `endless_events` | events without meaning, for ever | a list that never ends |
//! | `endless_reply` | names a run, then its reply never ends, in refusals that no text delta shows | the same list |
//! | `huge_event` | an event of one GiB, in short lines | a text of one GiB, announced as such |
//! | `invalid_utf8`, `deep_json`, `dense_json` | the first event is not UTF-8; is nested 100,000 deep; has millions of values | the same in the answer |
//! | `nested_json` | the first event is a long list of values that are nested 100 deep | the same in the answer |
//! | `full_page` | the same as JSON | a page of a list, as full as possible, with another one after it |
//! | `html` | a page | a page |
//! | `redirect` | 307 to `location` | 307 to `location` |
//! | `gzip` | unpacks without end, as `content-encoding` says | the same |
//! | `drip` | a byte, then the next one after `rate` (20 ms), for ever | the same |
//!
//! The functions of [`SimulatorHandle`] are available over HTTP too, below `/_simulator`: `GET
//! stats`, `GET runs`, `GET threads`, `GET threads/{id}/history`, `GET recorded`, `GET|POST|DELETE
//! faults`, `POST hold`, `POST release`, `POST reset`, `POST|DELETE threads/{id}/foreign_run`,
//! `GET responses`, `GET leaked_items`, `POST holds_text`.
//!
//! Where the protocols are not documented, the simulator decides:
//!
//! - Messages of a refused run are not appended.
//! - A run can be cancelled in every state except `cancelling` and the final ones.
//! - Deleting a thread ends its active run. The runs of the thread are deleted with it.
//! - A write to the items of a locked conversation is refused like a response.
//! - A background response holds the lock until it ends.
//! - An incomplete response is appended. A failed, cancelled or abandoned one is not, unless
//!   [`SimulatorConfig::append_unfinished`] is set.
//! - A deleted conversation cannot be used, read or listed. Items that were not deleted before it
//!   remain for ever. A client that knows their ids can read and delete them
//!   ([`SimulatorHandle::leaked_items`]). A response that ends after the deletion of its
//!   conversation leaves its items in the same way.
//! - The events of the newest 1000 background streams can be replayed.

// A file uses only files below it in this list, never those above it. `tests/it/architecture.rs`
// checks that.

// The TCP port and its connections.
mod listener;

// Routes requests to the protocols.
mod router;

// Inspection and steering: over HTTP, and from inside the process.
mod control;

mod handle;

mod text_search;

// The two protocols, which do not use each other.
mod assistants;

mod responses;

// Stored content.
mod state;

// Behaviour that directives and faults ask for.
mod behaviour;

// Reading requests and writing answers.
mod wire;

mod config;

pub use config::SimulatorConfig;
pub use handle::SimulatorHandle;
pub use listener::Simulator;
pub use state::faults::Fault;
pub use state::stats::{Recorded, RunView, Stats, ThreadView};
