//! Settings of a whole simulator. Directives or faults steer a single run.

use std::time::Duration;

use clap::ArgAction;
use humantime_serde::re::humantime::parse_duration;
use secrecy::SecretString;
use serde::Deserialize;

/// Settings of the simulator. By default it answers at once and enforces every rule.
#[derive(Clone, Debug, Deserialize, clap::Args)]
#[serde(default, deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "each is a knob of its own")]
pub struct SimulatorConfig {
    /// Time from the acceptance of a run to its first token.
    #[arg(long, default_value = "0ms", value_parser = parse_duration)]
    #[serde(with = "humantime_serde")]
    pub latency: Duration,
    /// Time between two tokens.
    #[arg(long, default_value = "0ms", value_parser = parse_duration)]
    #[serde(with = "humantime_serde")]
    pub token_interval: Duration,
    /// Least number of words of a reply; shorter replies are padded.
    #[arg(long, default_value_t = 0)]
    pub reply_words: usize,
    /// Time until an Assistants run expires, waits for tool outputs included.
    #[arg(long, default_value = "10m", value_parser = parse_duration)]
    #[serde(with = "humantime_serde")]
    pub run_expiry: Duration,
    /// Time from the acceptance of a cancel call to its effect.
    #[arg(long, default_value = "0ms", value_parser = parse_duration)]
    #[serde(with = "humantime_serde")]
    pub cancel_delay: Duration,
    /// Time for which a conversation stays locked after its response has ended.
    #[arg(long, default_value = "0ms", value_parser = parse_duration)]
    #[serde(with = "humantime_serde")]
    pub lock_linger: Duration,
    /// The only accepted API key. By default every key is accepted that does not begin with `bad`.
    #[arg(long)]
    pub api_key: Option<SecretString>,
    /// Refuse messages and runs on a thread that has an active run; some servers do not.
    #[arg(long, default_value_t = true, action = ArgAction::Set)]
    pub enforce_locks: bool,
    /// Offer `/conversations`; some servers do not.
    #[arg(long, default_value_t = true, action = ArgAction::Set)]
    pub conversations: bool,
    /// Offer lists of all threads and of all conversations; few servers do.
    #[arg(long)]
    pub list_threads: bool,
    /// Keep the input and the partial output of a failed, cancelled or interrupted response in
    /// its conversation.
    #[arg(long)]
    pub append_unfinished: bool,
    /// Most words that a model reads; a run whose context has more is refused. By default there is
    /// no limit.
    #[arg(long)]
    pub context_words: Option<u64>,
    /// Most threads, conversations, runs and responses kept, of each kind; beyond it the oldest
    /// idle ones are removed.
    #[arg(long, default_value_t = 100_000)]
    pub max_kept: usize,
    /// Most requests recorded for inspection, with bodies of up to 256 KiB.
    #[arg(long, default_value_t = 256)]
    pub recorded: usize,
}

impl Default for SimulatorConfig {
    fn default() -> Self {
        Self {
            latency: Duration::ZERO,
            token_interval: Duration::ZERO,
            reply_words: 0,
            run_expiry: Duration::from_mins(10),
            cancel_delay: Duration::ZERO,
            lock_linger: Duration::ZERO,
            api_key: None,
            enforce_locks: true,
            conversations: true,
            list_threads: false,
            append_unfinished: false,
            context_words: None,
            max_kept: 100_000,
            recorded: 256,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::{Args, Command, FromArgMatches};

    use super::*;

    #[test]
    fn no_flag_means_the_default() {
        let matches =
            SimulatorConfig::augment_args(Command::new("simulate")).get_matches_from(["simulate"]);
        let parsed = SimulatorConfig::from_arg_matches(&matches).unwrap();
        assert_eq!(
            format!("{parsed:?}"),
            format!("{:?}", SimulatorConfig::default())
        );
    }

    #[test]
    fn flags_say_what_they_mean() {
        let flags = [
            "simulate",
            "--latency=50ms",
            "--enforce-locks=false",
            "--api-key=sk-secret",
            "--list-threads",
        ];
        let matches =
            SimulatorConfig::augment_args(Command::new("simulate")).get_matches_from(flags);
        let parsed = SimulatorConfig::from_arg_matches(&matches).unwrap();
        assert_eq!(
            (parsed.latency, parsed.enforce_locks),
            (Duration::from_millis(50), false)
        );
        assert!(parsed.list_threads);
        assert!(!format!("{parsed:?}").contains("sk-secret"));
    }
}
