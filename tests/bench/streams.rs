//! The cost of streams that are open at the same time.

use tokio::task::JoinSet;
use tokio::time::sleep;

use super::Args;
use super::callers::{Callers, Form};
use super::figures::count;
use super::process::open_files;
use super::setting::{Kind, Setting};

/// A reply of ten minutes, one word a second.
const SLOW: &str = "hello [[sim: rate=1s tokens=600]]";
/// Number of files that the gateway opens for other purposes.
const OTHER_FILES: usize = 256;

pub(crate) async fn report(args: &Args, database: Kind) {
    // A stream needs a connection to its caller and one to the upstream.
    let most = open_files().saturating_sub(OTHER_FILES) / 2;
    let streams = args.streams.min(most);
    if streams < args.streams {
        println!(
            "a process may open {} files: {streams} streams instead of {}",
            open_files(),
            args.streams
        );
    }
    let connections = streams + OTHER_FILES;
    let limits = format!(
        "[server]\nmax_connections = {connections}\n[runs]\nmax_runs = {connections}\ntimeout = \"10m\"\n"
    );
    let setting = Setting::new(database, !args.share, &[], &limits).await;
    // Each user has a conversation before, so that only the streams are measured.
    let callers = setting.known_callers(streams).await;
    let callers = callers.who_ask_for(Form::Stream).who_say(SLOW.to_owned());
    let before = setting.gateway.memory();
    let (mut open, refused) = open(&callers, streams).await;
    sleep(args.time).await;
    let with = setting.gateway.memory();
    let opened = open.len();
    while open.try_join_next().is_some() {}
    println!("{database:?}, streams that get a word a second:");
    println!(
        "  {opened} opened, {refused} refused, {} open at the end",
        open.len()
    );
    println!(
        "  resident memory of the gateway: {:.0} KiB before and {:.0} KiB with them, {:.1} KiB a stream",
        before,
        with,
        (with - before) / count(open.len())
    );
}

/// Opens streams one after the other. Returns the tasks that read them, and the number of
/// refusals.
async fn open(callers: &Callers, streams: usize) -> (JoinSet<()>, usize) {
    let (mut open, mut refused) = (JoinSet::new(), 0);
    for _ in 0..streams {
        let mut connection = callers.connect().await;
        if connection.begin(&callers.message()).await == Some(200) {
            open.spawn(async move { connection.read_on().await });
        } else {
            refused += 1;
        }
    }
    (open, refused)
}
