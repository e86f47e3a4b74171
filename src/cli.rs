//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::builder::{OsStringValueParser, PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};

use crate::config::LISTEN_FORM;
use crate::domain::Access;
use crate::simulator::SimulatorConfig;

/// An HTTP gateway between chatbot frontends and a hosted conversation API: one thread per user, session or topic,
/// and one run at a time on it.
#[derive(Clone, Debug, Parser)]
#[command(name = "threadkeeper", version, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    Dev(DevArgs),
    Serve(ServeArgs),
    Simulate(SimulateArgs),
    Migrate(MigrateArgs),
    Export(ExportArgs),
    Import(ImportArgs),
    Keys(KeysArgs),
    Fingerprint(FingerprintArgs),
    CheckConfig(CheckConfigArgs),
    Sql(SqlArgs),
    Health(HealthArgs),
}

/// Try it out: the gateway with a simulated upstream, in one process.
///
/// Needs no configuration, keys or database server: conversations are kept in a SQLite file in the data folder, and
/// the replies are made up by the built-in simulator. Not for production.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  threadkeeper dev
  threadkeeper dev --listen 127.0.0.1:9000 --data /var/tmp/threadkeeper
  docker run --rm -p 127.0.0.1:8080:8080 threadkeeper dev --listen 0.0.0.0:8080")]
pub struct DevArgs {
    /// Address to listen on. Nobody has to prove who they are: keep it on loopback, or in a container whose port is published
    /// there.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8080", value_parser = listen)]
    pub listen: SocketAddr,
    /// Folder of the database. Made if it does not exist.
    #[arg(long, value_name = "DIR", default_value = "./data")]
    pub data: PathBuf,
}

/// Run the gateway.
///
/// Refuses to start if anything is wrong with the configuration, and lists all of it. The first SIGTERM or SIGINT lets
/// running turns end within the grace time, the second one does not.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  threadkeeper serve --config gateway.toml
  DATABASE_URL=postgres://user@host/db threadkeeper serve --config gateway.toml --listen 127.0.0.1:9000")]
pub struct ServeArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Address to listen on, in place of the configured one.
    #[arg(long, value_name = "ADDR", value_parser = listen)]
    pub listen: Option<SocketAddr>,
}

/// Run only the simulated upstream, for tests, demos and benchmarks.
///
/// Speaks both protocols (Assistants v2 under /v1 with threads and runs, and Conversations + Responses) and, unless
/// `--api-key` says otherwise, accepts every key that does not begin with `bad`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  threadkeeper simulate
  threadkeeper simulate --listen 127.0.0.1:9100 --latency 300ms --token-interval 20ms --reply-words 200

A turn is steered from the user's own text, by words in [[sim: …]]:
  [[sim: latency=2s rate=50ms tokens=100]]    how long and how fast
  [[sim: tool=get_weather]] [[sim: fail]] [[sim: incomplete]] [[sim: refusal]]
  [[sim: status=429 retry_after=2]] [[sim: cut=5]] [[sim: silent_after=3]] [[sim: no_terminal]]
The same words wait for the next requests, whatever these say, with
  curl --json '{\"on\": \"start\", \"fault\": \"status=500\", \"times\": 2}' http://127.0.0.1:9090/_simulator/faults
and `chance=30` among them lets 70 of 100 requests alone. Its figures are at /_simulator/stats. All words: the documentation of the module `simulator`.")]
pub struct SimulateArgs {
    /// Address to listen on.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9090", value_parser = listen)]
    pub listen: SocketAddr,
    #[command(flatten)]
    pub knobs: SimulatorConfig,
}

/// Bring the database's schema up to date, and end.
///
/// For deployments where `serve` must not do it (`store.migrate_on_start = false`). Harmless to repeat.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  threadkeeper migrate --config gateway.toml
  DATABASE_URL=postgres://owner@host/db threadkeeper migrate")]
pub struct MigrateArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
}

/// Write all conversations out: threads, runs and messages, one JSON object a line.
///
/// The last line counts the others, so that a file which was cut off is noticed. `import` reads the format; the
/// documentation of the module `records` describes it. The file is not encrypted, and holds all that was said.
///
/// Postgres can be read while the gateway runs. A SQLite file serves one process: stop the gateway first.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  threadkeeper export --config gateway.toml --out conversations.ndjson
  DATABASE_URL=postgres://user@host/db threadkeeper export --tenant default")]
pub struct ExportArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// The file to write, in place of standard output. What it held is lost.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Whose conversations.
    #[arg(long, value_name = "TENANT", default_value = "default")]
    pub tenant: String,
}

/// Bring conversations along: an export, or a table of users and upstream threads.
///
/// Reads one JSON object a line. What is there already is left as it is, so the same file can be read again. Lines that
/// cannot be taken are named on standard error, the others are taken; the exit code is 0 if all were. Runs are passed
/// over.
///
/// A SQLite file serves one process: stop the gateway first.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  threadkeeper import --config gateway.toml conversations.ndjson
  threadkeeper import --config gateway.toml -

The least that makes a thread known, and messages that may follow it:
  {\"type\": \"thread\", \"key\": {\"user\": \"alice\"}, \"upstream_thread_id\": \"thread_abc\"}
  {\"type\": \"message\", \"role\": \"user\", \"content\": \"Hello\"}")]
pub struct ImportArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// The file to read; `-`, or none, is standard input.
    #[arg(value_name = "FILE", default_value = "-")]
    pub file: PathBuf,
}

/// Make, list and revoke API keys.
///
/// They are good where `auth.stored_keys = true`. A gateway that runs takes up a new key, and drops a revoked one, within
/// a few seconds. A SQLite file serves one process: stop the gateway first, or write keys into its configuration.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  threadkeeper keys create --scope chat --label web
  threadkeeper keys create --tenant acme --scope read --label reports --config gateway.toml
  threadkeeper keys list --tenant acme
  threadkeeper keys revoke tk_0123456789ab")]
pub struct KeysArgs {
    #[command(subcommand)]
    pub command: KeysCommand,
}

#[derive(Clone, Debug, Subcommand)]
pub enum KeysCommand {
    /// Make a key. It is written to standard output, this once: only its hash is kept.
    Create {
        #[command(flatten)]
        config: ConfigArgs,
        /// Whose conversations it opens.
        #[arg(long, value_name = "TENANT", default_value = "default")]
        tenant: String,
        /// read, chat (and read), admin (and see all threads of the tenant at once), or operator (and the work in the
        /// background, for all tenants).
        #[arg(long, value_name = "SCOPE", default_value = "chat", hide_possible_values = true,
            value_parser = PossibleValuesParser::new(Access::ALL.iter().map(|access| access.as_str()))
                .try_map(|text| text.parse::<Access>()))]
        scope: Access,
        /// What it is for. Shown in lists.
        #[arg(long, value_name = "TEXT", default_value = "")]
        label: String,
    },
    /// List the keys: how they begin, whose they are, what they open.
    List {
        #[command(flatten)]
        config: ConfigArgs,
        /// Those of this tenant alone.
        #[arg(long, value_name = "TENANT")]
        tenant: Option<String>,
    },
    /// Revoke a key. Whoever uses it is refused within a few seconds.
    Revoke {
        #[command(flatten)]
        config: ConfigArgs,
        /// How it begins, as lists show it.
        #[arg(value_name = "PREFIX")]
        prefix: String,
    },
}

/// Show what logs and upstreams call a tenant, a user, a session or a topic.
///
/// Names are not written there, but fingerprints of them, which are made with a key of the database's own: so another database
/// has others. The fields are `user` and `key` in logs, and `threadkeeper_tenant`, `…_user`, `…_session` and `…_topic` in the
/// metadata at an upstream. Where the upstream has `send_identifiers = true`, names stand there in clear.
///
/// A SQLite file serves one process: stop the gateway first.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  threadkeeper fingerprint --user alice@example.com --config gateway.toml
  threadkeeper fingerprint --tenant acme --user alice --session tab-1
  threadkeeper fingerprint --user alice --topic order-4711")]
pub struct FingerprintArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Whose user it is.
    #[arg(long, value_name = "TENANT", default_value = "default")]
    pub tenant: String,
    /// The user, as in the path of requests, but not percent-encoded.
    #[arg(long, value_name = "USER")]
    pub user: String,
    /// A session of the user.
    #[arg(long, value_name = "SESSION", conflicts_with = "topic")]
    pub session: Option<String>,
    /// A topic of the user.
    #[arg(long, value_name = "TOPIC")]
    pub topic: Option<String>,
}

/// Check the configuration as `serve` would, without connecting to anything, and end.
///
/// Lists every problem with the place where it was written. The exit code is 0 if there is none.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  threadkeeper check-config --config gateway.toml
  threadkeeper check-config --config gateway.toml --probe")]
pub struct CheckConfigArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Ask each upstream what it can do, too, and print a line for each capability.
    ///
    /// No run is started, so nothing is paid; a thread or conversation is made and deleted again. The exit code is 1 if an
    /// upstream cannot be used as it is configured.
    #[arg(long)]
    pub probe: bool,
}

/// Print the statements that the database is sent, to be pasted into psql or sqlite3.
///
/// `$1`, `$2`, … are parameters; a line before the statement says what they are. In psql put `PREPARE x AS` before it, for
/// example. Each begins with its name, under which `pg_stat_statements`, errors and spans show it. The functions that some
/// call are printed with them.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  threadkeeper sql
  threadkeeper sql admission.admit
  threadkeeper sql --engine sqlite finish.finish")]
pub struct SqlArgs {
    /// The name of a statement, or the first part of some. All, if it is left out.
    #[arg(value_name = "NAME", default_value = "")]
    pub name: String,
    /// Which database.
    #[arg(long, value_name = "ENGINE", default_value = "postgres",
        value_parser = PossibleValuesParser::new(["postgres", "sqlite"]))]
    pub engine: String,
}

/// Ask the gateway on this machine whether it lives, for the container's health check.
///
/// The exit code is 0 if `/healthz` of the configured listen address answers 200 within a few seconds. Of the configuration
/// only `server.listen` is looked at.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  threadkeeper health
  threadkeeper health --config gateway.toml")]
pub struct HealthArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// The address that the gateway listens on, if `serve` was told one.
    #[arg(long, value_name = "ADDR", value_parser = listen)]
    pub listen: Option<SocketAddr>,
}

/// Where settings come from.
#[derive(Args, Clone, Debug)]
pub struct ConfigArgs {
    /// The configuration, TOML. Without it `/etc/threadkeeper/gateway.toml` is read if it is there, and no other file.
    ///
    /// Environment variables are above the file: `THREADKEEPER_` and the path with two underscores between the levels
    /// (`THREADKEEPER_STORE__URL`), and `DATABASE_URL` for `store.url`.
    #[arg(long, value_name = "FILE", env = "THREADKEEPER_CONFIG", hide_env_values = true,
        value_parser = OsStringValueParser::new().map(PathBuf::from))]
    pub config: Option<PathBuf>,
}

/// What a listen address looks like.
fn listen(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| format!("{LISTEN_FORM} (a host name is not looked up)"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Command, clap::Error> {
        Cli::try_parse_from(line.split(' ')).map(|cli| cli.command)
    }

    #[test]
    fn the_definitions_hold_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_explains_itself_with_examples() {
        let mut cli = Cli::command();
        cli.build();
        let names: Vec<&str> = cli.get_subcommands().map(clap::Command::get_name).collect();
        assert_eq!(
            names,
            [
                "dev",
                "serve",
                "simulate",
                "migrate",
                "export",
                "import",
                "keys",
                "fingerprint",
                "check-config",
                "sql",
                "health",
                "help"
            ]
        );
        for command in cli
            .get_subcommands_mut()
            .filter(|command| command.get_name() != "help")
        {
            let help = command.render_long_help().to_string();
            assert!(help.contains("Examples:"), "{help}");
            assert!(command.get_long_about().is_some(), "{help}");
            assert!(
                command.get_opts().all(|option| option.get_help().is_some()),
                "{help}"
            );
        }
    }

    #[test]
    fn the_examples_in_the_help_are_accepted() {
        let cli = Cli::command();
        for command in cli.get_subcommands() {
            let help = command
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            for line in help
                .lines()
                .filter_map(|line| line.find("threadkeeper ").map(|at| &line[at..]))
            {
                assert!(parse(line).is_ok(), "{line}: {:?}", parse(line));
            }
        }
    }

    #[test]
    fn dev_needs_nothing() {
        let Ok(Command::Dev(args)) = parse("threadkeeper dev") else {
            panic!("not dev")
        };
        assert_eq!(args.listen, SocketAddr::from(([127, 0, 0, 1], 8080)));
        assert_eq!(args.data, PathBuf::from("./data"));
    }

    #[test]
    fn serve_takes_a_file_and_an_address() {
        let line = "threadkeeper serve --config a.toml --listen [::1]:1";
        let Ok(Command::Serve(args)) = parse(line) else {
            panic!("not serve")
        };
        assert_eq!(args.config.config, Some(PathBuf::from("a.toml")));
        assert_eq!(args.listen, Some("[::1]:1".parse().unwrap()));
        assert!(parse("threadkeeper serve --listen everywhere").is_err());
    }

    #[test]
    fn the_simulator_s_knobs_have_units() {
        let line = "threadkeeper simulate --latency 1s --token-interval 20ms --reply-words 5";
        let Ok(Command::Simulate(args)) = parse(line) else {
            panic!("not simulate")
        };
        assert_eq!(args.knobs.latency, Duration::from_secs(1));
        assert_eq!(args.knobs.token_interval, Duration::from_millis(20));
        assert_eq!(args.knobs.reply_words, 5);
        assert!(parse("threadkeeper simulate --latency 20").is_err());
    }

    #[test]
    fn an_import_without_a_file_reads_standard_input() {
        for line in ["threadkeeper import", "threadkeeper import -"] {
            let Ok(Command::Import(args)) = parse(line) else {
                panic!("not import")
            };
            assert_eq!(args.file, PathBuf::from("-"), "{line}");
        }
        let Ok(Command::Export(args)) = parse("threadkeeper export") else {
            panic!("not export")
        };
        assert_eq!((args.out, args.tenant.as_str()), (None, "default"));
    }

    #[test]
    fn a_command_is_required() {
        assert!(parse("threadkeeper").is_err());
        assert!(parse("threadkeeper check").is_err());
    }
}
