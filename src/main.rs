//! Reads the arguments, runs the command, and returns the exit code.

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use secrecy::ExposeSecret;
use threadkeeper::app::{self, App};
use threadkeeper::auth::KEY_PREFIX;
use threadkeeper::cli::{
    Cli, Command, ConfigArgs, DevArgs, ExportArgs, FingerprintArgs, ImportArgs, KeysCommand,
    SimulateArgs, SqlArgs,
};
use threadkeeper::config::{
    Config, ConfigFile, LogConfig, LogFormat, Sources, StoreConfig, USUAL_FILE, utf8_variables,
};
use threadkeeper::domain::{ConversationKey, Scope, SessionKey, TenantKey, TopicKey, UserKey};
use threadkeeper::error::Chain;
use threadkeeper::simulator::Simulator;
use threadkeeper::store::{Engine, StoredKey, functions_called_by, statements};
use threadkeeper::upstream::{Finding, Probe, Verdict, probe};
use threadkeeper::{dev, health, telemetry};
use tikv_jemallocator::Jemalloc;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// One OS thread allocates the memory of a run, and another often frees it. jemalloc does that with less
/// work than the C library, and returns the memory of large answers to the system.
#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// The settings that commands about the store read.
const OF_THE_STORE: [&str; 2] = ["store", "log"];
/// The settings that `import` reads.
const OF_AN_IMPORT: [&str; 6] = [
    "store",
    "log",
    "upstreams",
    "assistants",
    "sessions",
    "threads",
];
/// The settings that `keys` reads.
const OF_KEYS: [&str; 3] = ["store", "log", "auth.stored_keys"];

fn main() -> ExitCode {
    let result = rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("a TLS provider is installed already"))
        .and_then(|()| tokio::runtime::Runtime::new().context("cannot start the runtime"))
        .and_then(|runtime| {
            let result = runtime.block_on(run(Cli::parse().command));
            // All tasks have been told to stop. This does not wait for a hanging name look-up.
            runtime.shutdown_background();
            result
        });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_unread(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // Without a backtrace, because these errors are mistakes of the set-up, not of the code.
            tell(format_args!("threadkeeper: {}", Chain(error.as_ref())));
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Dev(args) => run_dev(args).await,
        Command::Serve(args) => {
            let config = Config::load_for_serve(sources(args.config, args.listen))?;
            telemetry::init(&config.log, LogFormat::Json)?;
            for doubt in config.doubts() {
                tracing::warn!(setting = doubt.path, "{}", doubt.what);
            }
            start(config, stop_signals()?).await
        }
        Command::Simulate(args) => run_simulator(args).await,
        Command::Migrate(args) => {
            let config = Config::load_parts(sources(args.config, None), &OF_THE_STORE)?;
            telemetry::init(&config.log, LogFormat::Pretty)?;
            app::migrate(&config.store).await?;
            Ok(writeln!(Output::new(), "the schema is up to date")?)
        }
        Command::Export(args) => run_export(args).await,
        Command::Import(args) => run_import(args).await,
        Command::Keys(args) => run_keys(args.command).await,
        Command::Fingerprint(args) => run_fingerprint(args).await,
        Command::CheckConfig(args) => {
            let config = Config::load_for_serve(sources(args.config, None))?;
            for doubt in config.doubts() {
                tell(format_args!("warning: {doubt}"));
            }
            writeln!(Output::new(), "the configuration is sound")?;
            if args.probe {
                probe_upstreams(&config).await
            } else {
                Ok(())
            }
        }
        Command::Sql(args) => print_sql(&args),
        Command::Health(args) => {
            health::check(Config::load_listen(sources(args.config, args.listen))?)
        }
    }
}

/// Prints the SQL statements for an engine.
fn print_sql(args: &SqlArgs) -> anyhow::Result<()> {
    let engine = if args.engine == "sqlite" {
        Engine::Sqlite
    } else {
        Engine::Postgres
    };
    let mut out = Output::new();
    let mut found = statements(engine)
        .filter(|it| it.name.starts_with(&args.name))
        .peekable();
    anyhow::ensure!(
        found.peek().is_some(),
        "no statement for {} has a name that begins with `{}`: `threadkeeper sql --engine {}` prints them \
         all",
        args.engine,
        args.name,
        args.engine
    );
    for statement in found {
        let parameters = statement
            .parameters
            .iter()
            .zip(1..)
            .map(|(name, n)| format!("${n} {name}"));
        let parameters: Vec<String> = parameters.collect();
        if !parameters.is_empty() {
            writeln!(out, "-- {}", parameters.join(", "))?;
        }
        writeln!(out, "{};\n", statement.sql)?;
        if engine == Engine::Postgres {
            for definition in functions_called_by(&statement.sql) {
                writeln!(
                    out,
                    "-- The function that it calls. `threadkeeper migrate` creates it.\n{definition};\n"
                )?;
            }
        }
    }
    Ok(())
}

/// Prints a line for each capability of each upstream.
async fn probe_upstreams(config: &Config) -> anyhow::Result<()> {
    let mut unusable = Vec::new();
    for (name, upstream) in &config.upstreams {
        let Probe {
            findings,
            is_usable,
        } = probe(name, upstream).await?;
        for Finding {
            capability,
            verdict,
            advice,
        } in findings
        {
            let verdict = match verdict {
                Verdict::Works => "works".to_owned(),
                Verdict::NotSupported => "not supported".to_owned(),
                Verdict::Refused(reason) => format!("refused: {reason}"),
            };
            let advice = advice
                .map(|advice| format!("; {advice}"))
                .unwrap_or_default();
            writeln!(
                Output::new(),
                "upstreams.{name}: {capability}: {verdict}{advice}"
            )?;
        }
        if !is_usable {
            unusable.push(format!("`{name}`"));
        }
    }
    anyhow::ensure!(
        unusable.is_empty(),
        "these upstreams cannot be used as they are configured: {}",
        unusable.join(", ")
    );
    Ok(())
}

/// Builds and runs the gateway. A signal ends it at once while it still waits for its database.
async fn start(config: Config, mut signals: impl AsyncFnMut()) -> anyhow::Result<()> {
    let app = tokio::select! {
        app = App::build(config) => app?,
        () = signals() => return Ok(()),
    };
    app.run(signals).await
}

/// Runs a gateway on SQLite and a simulator in one process.
async fn run_dev(args: DevArgs) -> anyhow::Result<()> {
    telemetry::init(&LogConfig::default(), LogFormat::Pretty)?;
    let simulator = Simulator::bind(dev::simulator(), SocketAddr::from(([127, 0, 0, 1], 0)))
        .await
        .context("cannot open a port for the simulated upstream")?;
    let config = dev::config(args.listen, &args.data, &simulator.base_url())?;
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    tasks.spawn(simulator.run(stop.clone()));
    let app = App::build(config).await?;
    writeln!(
        Output::new(),
        "{}",
        dev::banner(app.address(), Path::new(&args.data))
    )?;
    let result = app.run(stop_signals()?).await;
    stop.cancel();
    tasks.close();
    tasks.wait().await;
    result
}

async fn run_simulator(args: SimulateArgs) -> anyhow::Result<()> {
    telemetry::init(&LogConfig::default(), LogFormat::Pretty)?;
    let simulator = Simulator::bind(args.knobs, args.listen)
        .await
        .with_context(|| format!("cannot listen on {} (--listen)", args.listen))?;
    tracing::info!(address = %simulator.addr(), base_url = simulator.base_url(), "the simulated upstream is listening");
    let stop = CancellationToken::new();
    let mut signals = stop_signals()?;
    tokio::select! {
        () = simulator.run(stop.clone()) => {}
        () = signals() => {}
    }
    Ok(())
}

async fn run_export(args: ExportArgs) -> anyhow::Result<()> {
    let tenant = TenantKey::try_from(args.tenant).context("--tenant")?;
    let config = Config::load_parts(sources(args.config, None), &OF_THE_STORE)?;
    telemetry::init(&config.log, LogFormat::Pretty)?;
    let lines = app::export(
        &config.store,
        tenant,
        || -> anyhow::Result<Box<dyn Write>> {
            Ok(match args.out {
                Some(path) => {
                    let file = File::create(&path)
                        .with_context(|| format!("cannot write {}", path.display()))?;
                    Box::new(BufWriter::new(file))
                }
                None => Box::new(BufWriter::new(Output::new())),
            })
        },
    )
    .await?;
    tell(format_args!("exported: {lines} lines"));
    Ok(())
}

async fn run_import(args: ImportArgs) -> anyhow::Result<()> {
    /// Number of refusals that are printed one by one.
    const TOLD: u64 = 100;
    let config = Config::load_parts(sources(args.config, None), &OF_AN_IMPORT)?;
    telemetry::init(&config.log, LogFormat::Pretty)?;
    let input: Box<dyn BufRead> = if args.file == Path::new("-") {
        Box::new(BufReader::new(io::stdin()))
    } else {
        let path = &args.file;
        let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        Box::new(BufReader::new(file))
    };
    let mut refusals = 0;
    let summary = app::import(&config, input, |refused| {
        refusals += 1;
        if refusals <= TOLD {
            tell(format_args!("{refused}"));
        }
    })
    .await?;
    if refusals > TOLD {
        tell(format_args!("and {} more", refusals - TOLD));
    }
    tell(format_args!("imported: {summary}"));
    anyhow::ensure!(
        summary.refused == 0,
        "{} lines were refused",
        summary.refused
    );
    Ok(())
}

async fn run_keys(command: KeysCommand) -> anyhow::Result<()> {
    let tenant_key = |name: String| TenantKey::try_from(name).context("--tenant");
    let store = |args: ConfigArgs| -> anyhow::Result<StoreConfig> {
        let config = Config::load_parts(sources(args, None), &OF_KEYS)?;
        telemetry::init(&config.log, LogFormat::Pretty)?;
        if !config.auth.stored_keys {
            tell(format_args!(
                "auth.stored_keys is not true in this configuration: a gateway that runs with it refuses \
                 these keys"
            ));
        }
        Ok(config.store)
    };
    match command {
        KeysCommand::Create {
            config,
            tenant,
            scope,
            label,
        } => {
            anyhow::ensure!(label.len() <= 200, "--label is at most 200 bytes");
            let tenant = tenant_key(tenant)?;
            let key = app::create_key(&store(config)?, tenant, scope, label).await?;
            tell(format_args!(
                "the key {} of the tenant {}, which is shown only this time:",
                key.record.prefix,
                key.record.tenant.as_str()
            ));
            writeln!(Output::new(), "{}", key.key.expose_secret())?;
        }
        KeysCommand::List { config, tenant } => {
            let tenant = tenant.map(tenant_key).transpose()?;
            let keys = app::keys(&store(config)?, tenant.as_ref()).await?;
            let mut out = Output::new();
            writeln!(
                out,
                "{:16} {:9} {:20} {:21} {:8} LABEL",
                "PREFIX", "SCOPE", "TENANT", "CREATED", "STATE"
            )?;
            for StoredKey {
                key,
                created_at,
                revoked_at,
            } in keys
            {
                let (scope, tenant) = (key.access.as_str(), key.tenant.as_str());
                let created = created_at.format("%Y-%m-%dT%H:%M:%SZ").to_string();
                let state = if revoked_at.is_some() {
                    "revoked"
                } else {
                    "good"
                };
                // Escaped, because a label may have any characters.
                writeln!(
                    out,
                    "{:16} {scope:9} {tenant:20} {created:21} {state:8} {}",
                    key.prefix,
                    key.label.escape_debug()
                )?;
            }
        }
        KeysCommand::Revoke { config, prefix } => {
            // An operator may paste the whole key instead of its prefix.
            let prefix = prefix.get(..KEY_PREFIX).unwrap_or(&prefix);
            let key = app::revoke_key(&store(config)?, prefix).await?;
            writeln!(Output::new(), "{} is revoked", key.key.prefix)?;
        }
    }
    Ok(())
}

async fn run_fingerprint(args: FingerprintArgs) -> anyhow::Result<()> {
    let session = args
        .session
        .map(SessionKey::try_from)
        .transpose()
        .context("--session")?
        .map(Scope::Session);
    let topic = args
        .topic
        .map(TopicKey::try_from)
        .transpose()
        .context("--topic")?
        .map(Scope::Topic);
    let key = ConversationKey {
        tenant: TenantKey::try_from(args.tenant).context("--tenant")?,
        user: UserKey::try_from(args.user).context("--user")?,
        scope: session.or(topic).unwrap_or(Scope::User),
    };
    let config = Config::load(sources(args.config, None))?;
    telemetry::init(&config.log, LogFormat::Pretty)?;
    let names = app::fingerprint(&config.store, &key).await?;
    let mut out = Output::new();
    writeln!(out, "tenant  {}\nuser    {}", names.tenant, names.user)?;
    if let Some((kind, name)) = names.scope {
        writeln!(out, "{kind:7} {name}")?;
    }
    Ok(())
}

fn sources(args: ConfigArgs, listen: Option<SocketAddr>) -> Sources {
    let named = args
        .config
        .filter(|path| !path.as_os_str().is_empty())
        .map(ConfigFile::Path);
    let file = Some(named.unwrap_or_else(|| ConfigFile::IfThere(USUAL_FILE.into())));
    Sources {
        file,
        env: utf8_variables(std::env::vars_os()),
        listen,
    }
}

/// The reader of standard output has left, as `head` does when it has seen enough. The command then ends
/// without an error.
#[derive(Debug, thiserror::Error)]
#[error("nobody reads standard output any more")]
struct Unread;

fn is_unread(error: &anyhow::Error) -> bool {
    let mut errors = error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>());
    errors.any(|error| matches!(error.get_ref(), Some(inner) if inner.is::<Unread>()))
}

/// Standard output. A write fails with [`Unread`] if nobody reads it any more.
struct Output(io::Stdout);

impl Output {
    fn new() -> Self {
        Self(io::stdout())
    }

    fn failed(error: io::Error) -> io::Error {
        if error.kind() == io::ErrorKind::BrokenPipe {
            io::Error::other(Unread)
        } else {
            error
        }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes).map_err(Self::failed)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().map_err(Self::failed)
    }
}

/// Writes a line to standard error. Ignores errors, for example if nobody reads it.
fn tell(line: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Returns a function that waits for the next SIGTERM or SIGINT.
fn stop_signals() -> anyhow::Result<impl AsyncFnMut()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move || {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
