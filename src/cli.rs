//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::builder::{OsStringValueParser, PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};

use crate::config::LISTEN_FORM;
use crate::domain::Access;
use crate::simulator::SimulatorConfig;

/// An HTTP gateway between chatbot frontends and a hosted conversation API: one thread for each user,
/// session or topic, and one run at a time on it.
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

/// Try the gateway with a simulated upstream, in one process.
///
/// Needs no configuration, no keys and no database server. The gateway stores conversations in a SQLite
/// file in the data folder, and the built-in simulator invents the replies. Not for production.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  threadkeeper dev
  threadkeeper dev --listen 127.0.0.1:9000 --data /var/tmp/threadkeeper
  docker run --rm -p 127.0.0.1:8080:8080 threadkeeper dev --listen 0.0.0.0:8080")]
pub struct DevArgs {
    /// Address to listen on. The gateway asks for no credentials, so use loopback, or a container whose port
    /// is published on loopback.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8080", value_parser = listen)]
    pub listen: SocketAddr,
    /// Folder of the database. It is created if it does not exist.
    #[arg(long, value_name = "DIR", default_value = "./data")]
    pub data: PathBuf,
}

/// Run the gateway.
///
/// Refuses to start if the configuration has problems, and lists all of them. After the first SIGTERM or
/// SIGINT, active runs have the grace time to end. A second signal ends the grace time.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  threadkeeper serve --config gateway.toml
  DATABASE_URL=postgres://user@host/db threadkeeper serve --config gateway.toml --listen 127.0.0.1:9000")]
pub struct ServeArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Address to listen on, instead of the configured one.
    #[arg(long, value_name = "ADDR", value_parser = listen)]
    pub listen: Option<SocketAddr>,
}

/// Run only the simulated upstream, for tests, demos and benchmarks.
///
/// Speaks both protocols below /v1: Assistants v2 with threads and runs, and Conversations + Responses.
/// Without `--api-key` it accepts every key that does not begin with `bad`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  threadkeeper simulate
  threadkeeper simulate --listen 127.0.0.1:9100 --latency 300ms --token-interval 20ms --reply-words 200

Words in [[sim: …]] in the text of a user steer the run:
  [[sim: latency=2s rate=50ms tokens=100]]    how long and how fast
  [[sim: tool=get_weather]] [[sim: fail]] [[sim: incomplete]] [[sim: refusal]]
  [[sim: status=429 retry_after=2]] [[sim: cut=5]] [[sim: silent_after=3]] [[sim: no_terminal]]
The same words steer the next requests, with any text, after
  curl --json '{\"on\": \"start\", \"fault\": \"status=500\", \"times\": 2}' http://127.0.0.1:9090/_simulator/faults
With `chance=30` among them they affect 30 of 100 requests.
All words are in the comment at the top of src/simulator.rs. Statistics are at /_simulator/stats.")]
pub struct SimulateArgs {
    /// Address to listen on.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9090", value_parser = listen)]
    pub listen: SocketAddr,
    #[command(flatten)]
    pub knobs: SimulatorConfig,
}

/// Bring the schema of the database up to date, and end.
///
/// For deployments in which `serve` must not do that (`store.migrate_on_start = false`). It can be repeated.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  threadkeeper migrate --config gateway.toml
  DATABASE_URL=postgres://owner@host/db threadkeeper migrate")]
pub struct MigrateArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
}

/// Write all conversations of a tenant: threads, runs and messages, one JSON object a line.
///
/// The last line counts the others. A file without it was cut off. `import` reads the format, and
/// docs/export-import.md describes it. The file is not encrypted, and has the content of all messages.
///
/// With Postgres the gateway may run meanwhile. A SQLite file serves one process: stop the gateway first.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  threadkeeper export --config gateway.toml --out conversations.ndjson
  DATABASE_URL=postgres://user@host/db threadkeeper export --tenant default")]
pub struct ExportArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// File to write, instead of standard output. An existing file is overwritten.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Tenant whose conversations are written.
    #[arg(long, value_name = "TENANT", default_value = "default")]
    pub tenant: String,
}

/// Read conversations: an export, or a table of users and upstream threads.
///
/// Reads one JSON object a line. Changes nothing that exists already, so the same file can be read again.
/// Adds the valid lines, and names each refused line on standard error. The exit code is 0 if no line was
/// refused. Runs are ignored.
///
/// A SQLite file serves one process: stop the gateway first.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  threadkeeper import --config gateway.toml conversations.ndjson
  threadkeeper import --config gateway.toml -

The shortest line for a thread, and a message that may follow it:
  {\"type\": \"thread\", \"key\": {\"user\": \"alice\"}, \"upstream_thread_id\": \"thread_abc\"}
  {\"type\": \"message\", \"role\": \"user\", \"content\": \"Hello\"}")]
pub struct ImportArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// File to read. `-`, or no file, is standard input.
    #[arg(value_name = "FILE", default_value = "-")]
    pub file: PathBuf,
}

/// Create, list and revoke API keys.
///
/// A gateway with `auth.stored_keys = true` accepts these keys. It learns of new and revoked keys within a
/// few seconds. A SQLite file serves one process: stop the gateway first, or write keys into its
/// configuration.
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
    /// Create a key. It is written to standard output only now: the database has only its hash.
    Create {
        #[command(flatten)]
        config: ConfigArgs,
        /// Tenant whose conversations the key opens.
        #[arg(long, value_name = "TENANT", default_value = "default")]
        tenant: String,
        /// Access of the key: read; chat, which includes read; admin, which also lists all threads of the
        /// tenant; or operator, which also runs the janitor for all tenants.
        #[arg(long, value_name = "SCOPE", default_value = "chat", hide_possible_values = true,
            value_parser = PossibleValuesParser::new(Access::ALL.iter().map(|access| access.as_str()))
                .try_map(|text| text.parse::<Access>()))]
        scope: Access,
        /// Purpose of the key, shown in lists.
        #[arg(long, value_name = "TEXT", default_value = "")]
        label: String,
    },
    /// List the keys: prefix, scope, tenant, creation, state, label.
    List {
        #[command(flatten)]
        config: ConfigArgs,
        /// List only the keys of this tenant.
        #[arg(long, value_name = "TENANT")]
        tenant: Option<String>,
    },
    /// Revoke a key. Gateways refuse it within a few seconds.
    Revoke {
        #[command(flatten)]
        config: ConfigArgs,
        /// Prefix of the key, as `keys list` shows it.
        #[arg(value_name = "PREFIX")]
        prefix: String,
    },
}

/// Show the fingerprints of a tenant, a user, a session or a topic.
///
/// Logs and upstreams get fingerprints instead of names. Each database has its own key for them, so other
/// databases have other fingerprints. Logs have them in the fields `user` and `key`. The metadata at an
/// upstream has them in `threadkeeper_tenant`, `…_user`, `…_session` and `…_topic`. An upstream with
/// `send_identifiers = true` gets the names in clear.
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
    /// Tenant of the user.
    #[arg(long, value_name = "TENANT", default_value = "default")]
    pub tenant: String,
    /// The user, as in the path of requests but not percent-encoded.
    #[arg(long, value_name = "USER")]
    pub user: String,
    /// A session of the user.
    #[arg(long, value_name = "SESSION", conflicts_with = "topic")]
    pub session: Option<String>,
    /// A topic of the user.
    #[arg(long, value_name = "TOPIC")]
    pub topic: Option<String>,
}

/// Check the configuration as `serve` does, without connecting to anything, and end.
///
/// Lists every problem with its file and line, or its variable. The exit code is 0 if there is none.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  threadkeeper check-config --config gateway.toml
  threadkeeper check-config --config gateway.toml --probe")]
pub struct CheckConfigArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Also ask each upstream what it can do, and print a line for each capability.
    ///
    /// This starts no run, so it costs nothing. It creates a thread or conversation and deletes it again. The
    /// exit code is 1 if an upstream cannot be used as it is configured.
    #[arg(long)]
    pub probe: bool,
}

/// Print the SQL statements of the gateway, to paste them into psql or sqlite3.
///
/// `$1`, `$2`, … are parameters, and a line before the statement names them. In psql, put `PREPARE x AS`
/// before a statement, for example. Each statement begins with its name, which `pg_stat_statements`, errors
/// and spans show too. Functions that a statement calls are printed with it.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  threadkeeper sql
  threadkeeper sql admission.admit
  threadkeeper sql --engine sqlite finish.finish")]
pub struct SqlArgs {
    /// Name of a statement, or the beginning of some names. All statements if it is left out.
    #[arg(value_name = "NAME", default_value = "")]
    pub name: String,
    /// Engine of the database.
    #[arg(long, value_name = "ENGINE", default_value = "postgres",
        value_parser = PossibleValuesParser::new(["postgres", "sqlite"]))]
    pub engine: String,
}

/// Check that the gateway on this machine lives, for the health check of a container.
///
/// The exit code is 0 if `/healthz` at the configured listen address answers 200 within a few seconds. Only
/// `server.listen` of the configuration matters.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  threadkeeper health
  threadkeeper health --config gateway.toml")]
pub struct HealthArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Address that the gateway listens on, if `serve` got `--listen`.
    #[arg(long, value_name = "ADDR", value_parser = listen)]
    pub listen: Option<SocketAddr>,
}

/// The source of the settings.
#[derive(Args, Clone, Debug)]
pub struct ConfigArgs {
    /// File with the configuration, TOML. Without this flag, `/etc/threadkeeper/gateway.toml` if it exists.
    ///
    /// Environment variables take precedence over the file. Their names are `THREADKEEPER_` and the path with
    /// two underscores between the levels (`THREADKEEPER_STORE__URL`). `DATABASE_URL` stands for `store.url`.
    #[arg(long, value_name = "FILE", env = "THREADKEEPER_CONFIG", hide_env_values = true,
        value_parser = OsStringValueParser::new().map(PathBuf::from))]
    pub config: Option<PathBuf>,
}

/// Parses a listen address.
fn listen(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| format!("{LISTEN_FORM} (the gateway looks up no host names)"))
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
