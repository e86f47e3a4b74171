//! Logs: one line for each event on standard error, as JSON for machines or as compact text for people.
//!
//! - Keys are logged as fingerprints. Content and secrets are never logged.
//! - Libraries choose themselves what they log, so no filter shows more of it than is known to be
//!   harmless.
//! - A panic is logged too. Its message is left out if it was formatted at run time, because it may
//!   repeat content.

use std::io::IsTerminal;
use std::panic::PanicHookInfo;

use tracing::Subscriber;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::{ParseError, Targets};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{EnvFilter, Layer, Registry};

use crate::config::{LogConfig, LogFormat};

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// `RUST_LOG` is not a filter. The filter of the configuration was checked when it was loaded.
    #[error("RUST_LOG or log.filter is not a log filter: write it like `threadkeeper=debug,info`")]
    Filter(#[source] ParseError),
    #[error("logging is set up already")]
    Twice(#[source] TryInitError),
}

/// Sends the logs of the process to standard error, and panics to the logs. Call it once per process,
/// before anything logs.
///
/// `RUST_LOG`, if set, replaces `log.filter`. `format` applies if `log.format` is unset. Colours need a
/// terminal, and `NO_COLOR` unset.
///
/// # Errors
///
/// `RUST_LOG` is not a filter, or logging is set up already.
pub fn init(log: &LogConfig, format: LogFormat) -> Result<(), TelemetryError> {
    let rust_log = std::env::var("RUST_LOG")
        .ok()
        .filter(|filter| !filter.is_empty());
    let filter = filter(log, rust_log.as_deref()).map_err(TelemetryError::Filter)?;
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let is_colored = !no_color && std::io::stderr().is_terminal();
    subscriber(
        filter,
        log.format.unwrap_or(format),
        is_colored,
        std::io::stderr,
    )
    .try_init()
    .map_err(TelemetryError::Twice)?;
    std::panic::set_hook(Box::new(log_panic));
    Ok(())
}

fn filter(log: &LogConfig, rust_log: Option<&str>) -> Result<EnvFilter, ParseError> {
    match rust_log {
        Some(filter) => EnvFilter::try_new(filter),
        None => log.env_filter(),
    }
}

fn subscriber<W>(
    filter: EnvFilter,
    format: LogFormat,
    is_colored: bool,
    writer: W,
) -> impl Subscriber + Send + Sync + 'static
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    // If nobody reads standard error any more, a report about that would fail too, with a panic.
    let lines = tracing_subscriber::fmt::layer::<Registry>()
        .with_writer(writer)
        .log_internal_errors(false);
    let lines = match format {
        // The fields of the event are at the top level. `spans` has those of its spans, outermost first.
        LogFormat::Json => lines
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(true)
            .boxed(),
        LogFormat::Pretty => lines.compact().with_ansi(is_colored).boxed(),
    };
    tracing_subscriber::registry()
        .with(lines)
        .with(filter)
        .with(discretion())
}

/// Returns the limit of every filter: what may be logged at most.
///
/// Below `info`, a library may log the data that passes through it. The reader of event streams, for
/// example, logs their comments, and its next version may log more.
fn discretion() -> Targets {
    Targets::new()
        .with_default(LevelFilter::INFO)
        .with_target("threadkeeper", LevelFilter::TRACE)
        // The statements are the gateway's own, without values.
        .with_target("sqlx::query", LevelFilter::DEBUG)
        // This target logs the value of an unknown URL parameter, such as a misspelt password.
        .with_target("sqlx_postgres::options", LevelFilter::OFF)
}

fn log_panic(panic: &PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let location = panic.location().map(ToString::to_string);
    tracing::error!(
        panic.message = constant_message(panic.payload()),
        panic.location = location,
        panic.thread = thread.name(),
        "a task panicked"
    );
}

/// Returns the message of a panic if it is a constant of the source.
fn constant_message(payload: &(dyn std::any::Any + Send)) -> Option<&'static str> {
    payload.downcast_ref::<&'static str>().copied()
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// Returns what `work` logs.
    fn logged(
        log: &LogConfig,
        rust_log: Option<&str>,
        format: LogFormat,
        work: impl FnOnce(),
    ) -> String {
        let lines = Lines::default();
        let writer = lines.clone();
        let filter = filter(log, rust_log).unwrap();
        let subscriber = subscriber(filter, format, false, move || writer.clone());
        tracing::subscriber::with_default(subscriber, work);
        let bytes = lines.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn a_json_line_holds_the_event_and_the_spans_around_it() {
        let text = logged(&LogConfig::default(), None, LogFormat::Json, || {
            let request = tracing::info_span!("request", request_id = "r1").entered();
            tracing::info_span!("run", run.id = "run_1")
                .in_scope(|| tracing::info!(duration_ms = 5, "ended\nwell"));
            drop(request);
        });
        assert_eq!(text.lines().count(), 1, "{text}");
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(line["message"], "ended\nwell");
        assert_eq!(line["duration_ms"], 5);
        assert_eq!(line["level"], "INFO");
        assert_eq!(line["spans"][0]["request_id"], "r1");
        assert_eq!(line["spans"][1]["run.id"], "run_1");
        let time = line["timestamp"].as_str().unwrap();
        assert!(
            time.ends_with('Z') && chrono::DateTime::parse_from_rfc3339(time).is_ok(),
            "{time}"
        );
    }

    #[test]
    fn pretty_lines_are_plain_without_a_terminal() {
        let text = logged(&LogConfig::default(), None, LogFormat::Pretty, || {
            tracing::info!(answer = 42, "hello");
        });
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(
            text.contains("hello") && text.contains("answer=42") && !text.contains('\u{1b}'),
            "{text:?}"
        );
    }

    #[test]
    fn rust_log_replaces_the_configured_filter() {
        let log = LogConfig {
            filter: "warn".to_owned(),
            ..LogConfig::default()
        };
        let work = || {
            tracing::info!("quiet");
            tracing::warn!("loud");
        };
        let text = logged(&log, None, LogFormat::Pretty, work);
        assert!(text.contains("loud") && !text.contains("quiet"), "{text}");
        assert!(logged(&log, Some("info"), LogFormat::Pretty, work).contains("quiet"));
        assert!(filter(&log, Some("threadkeeper=loud")).is_err());
    }

    #[test]
    fn no_filter_opens_what_libraries_say_of_their_work() {
        let work = || {
            tracing::trace!("ours");
            tracing::info!(target: "hyper::proto", "at work");
            tracing::debug!(target: "hyper::proto", "hunter2");
            tracing::debug!(target: "sse_stream::stream::parser", comment = "hunter2");
            tracing::debug!(target: "sqlx::query", "SELECT $1");
            tracing::trace!(target: "sqlx::query", "hunter2");
            tracing::warn!(target: "sqlx_postgres::options::parse", value = "hunter2");
        };
        for filter in [
            "trace",
            "hyper=trace,sse_stream=trace,sqlx=trace,sqlx_postgres=trace,threadkeeper=trace",
        ] {
            let text = logged(&LogConfig::default(), Some(filter), LogFormat::Json, work);
            for said in ["ours", "at work", "SELECT $1"] {
                assert!(text.contains(said), "{filter}: {text}");
            }
            assert!(!text.contains("hunter2"), "{filter}: {text}");
        }
        assert!(
            !logged(&LogConfig::default(), Some("warn"), LogFormat::Json, work).contains("at work")
        );
    }

    #[test]
    fn only_constant_panic_messages_are_told() {
        let payload = |panic: fn()| std::panic::catch_unwind(panic).unwrap_err();
        assert_eq!(
            constant_message(&*payload(|| panic!("a constant"))),
            Some("a constant")
        );
        let put_together = payload(|| panic!("{}", std::hint::black_box("hunter2")));
        assert_eq!(constant_message(&*put_together), None);
    }
}
