//! A simulated upstream that speaks both protocols on one port, for development, demos, tests and benches.
//!
//! It enforces what the protocols are known to enforce: one run per thread, state transitions, expiry, closed
//! request schemas, limits, event order. Replies repeat the user's text and count the user's messages, so that a
//! reader can check what the server knew.
//!
//! Knobs that hold for all turns are in [`SimulatorConfig`]. A single turn is steered from the user's text (or
//! from a function's output) with directives `[[sim: … ]]`, several words in one or several brackets; they are
//! not repeated in the reply:
//!
//! | Directive | The turn |
//! |---|---|
//! | `tool=NAME` (repeatable), `tools=N` | asks for functions before it replies |
//! | `fail`, `incomplete` | ends `failed` (`server_error`), or `incomplete` after half of the text |
//! | `fail_text=open_call`, `fail_text=reasoning` | is accepted, then ends `failed` with the words for a damaged conversation and nothing else; as a fault it takes the place of the refusal (responses only) |
//! | `refusal`, `reasoning`, `parts=N` | refuses; reasons first (responses only); replies in N messages |
//! | `dangling_reasoning` | leaves a reasoning item without a successor, so that the next turn is refused (responses only) |
//! | `stuck_cancel` | accepts a cancel that never takes effect: the run stays `cancelling`, or, for a response, the cancel call has no answer |
//! | `latency=500ms`, `rate=20ms`, `tokens=50` | takes so long to its first token, and from one to the next; has at least so many words |
//! | `status=429`, `code=…`, `retry_after=2` | is not accepted: an HTTP error |
//! | `hostile=KIND` (`rate`, `status`, `location=URL`) | is not accepted: the answer is to harm its reader, see below |
//! | `drop=before`, `drop=after` | the connection closes without an answer, before or after the turn was accepted |
//! | `silent`, `silent_after=N` | is accepted, then nothing is sent, or nothing after N deltas |
//! | `hold_after=N` | a hold takes effect after N deltas, not before the first one |
//! | `cut=N` | the connection breaks after N deltas |
//! | `chance=30` | what stands beside it holds for so many of a hundred requests, at random |
//! | `late_head=2s` | is accepted and worked on, but the head of its answer is held back for so long |
//! | `mid_error`, `mid_error=nested`, `mid_error=bare` | an `error` event after the first deltas, in either shape, or nested without saying what it is; the run fails |
//! | `bare_error=FORM` | is not accepted, but its answer is a success, which tells the error (`code=…`, `error_type=…`) in its body: `data: {"error": {…}}` (`object`), the same and `data: [DONE]` (`done`), `data: {"error": "…"}` (`string`), `data: {"message": …}` (`flat`), `data: {"detail": …}` (`detail`), JSON in an event stream (`line`), or no event stream but JSON (`json`) |
//! | `no_terminal` | the stream ends properly but without its last events |
//! | `crlf`, `no_event_lines`, `split`, `comments`, `unknown_events` | the stream is written so (`no_event_lines`: responses only; `split`: in cuts of 1 to 3 bytes) |
//!
//! The same words make up a [`Fault`], which waits for the next matching requests whatever these contain. For
//! operations that start no run, `status` (with `code`, `retry_after`), `hostile`, `bare_error`, `drop`, `silent` and `latency` apply.
//!
//! A hostile answer has status 200, or the one of `status`. It is made while it is read, and ends when the reader leaves:
//!
//! | Kind | As a stream | As JSON |
//! |---|---|---|
//! | `endless_line` | a line that never ends | a text that never ends |
//! | `endless_events` | events that mean nothing, for ever | a list that never ends |
//! | `endless_reply` | a run is named, then its reply goes on for ever, in refusals that no delta of text tells | the same list |
//! | `huge_event` | an event of one GiB, in short lines | a text of one GiB, announced as such |
//! | `invalid_utf8`, `deep_json`, `dense_json` | the first event is not UTF-8; is nested 100,000 deep; has millions of values | the same of the answer |
//! | `full_page` | the same as JSON | a page of a list, as full as can be, with another one behind it |
//! | `html` | a page | a page |
//! | `redirect` | 307 to `location` | 307 to `location` |
//! | `gzip` | unpacks to no end, as `content-encoding` says | the same |
//! | `drip` | a byte, then the next one after `rate` (20 ms), for ever | the same |
//!
//! What [`SimulatorHandle`] offers can be had over HTTP too, below `/_simulator`: `GET stats`, `GET runs`, `GET threads`,
//! `GET threads/{id}/history`, `GET recorded`, `GET|POST|DELETE faults`, `POST hold`, `POST release`, `POST reset`,
//! `POST|DELETE threads/{id}/foreign_run`, `GET responses`, `GET leaked_items`, `POST holds_text`.
//!
//! Where the protocols are not documented, it decides as follows. Messages of a refused run are not appended.
//! A run can be cancelled in every state but `cancelling` and the final ones. Deleting a thread ends its run. Writes
//! to the items of a locked conversation are refused like a response. A background response holds the lock until
//! it ends. An incomplete response is appended; a failed, cancelled or abandoned one is not, unless
//! [`SimulatorConfig::append_unfinished`] says so. A deleted conversation cannot be used, read or listed any more; items
//! that were not deleted before it are kept for ever, and can be read and deleted by whoever knows their ids
//! ([`SimulatorHandle::leaked_items`]). A response that ends after its conversation was deleted leaves its items so too.
//! The runs of a thread go with it. The events of the newest 1000 background streams can be replayed.

// A file names what stands below it in this list, never what stands above: `tests/it/tidy.rs` checks it.

// The port and its connections.
mod listener;

// From a request to its protocol.
mod router;

// The two ways to look in and to steer.
mod control;

mod handle;

mod text_search;

// The two protocols, which know nothing of each other.
mod assistants;

mod responses;

// What is stored.
mod state;

// What a request or turn is told to do.
mod behaviour;

// How requests are read and answers written.
mod wire;

mod config;

pub use config::SimulatorConfig;
pub use handle::SimulatorHandle;
pub use listener::Simulator;
pub use state::faults::Fault;
pub use state::stats::{Recorded, RunView, Stats, ThreadView};
