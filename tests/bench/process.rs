//! Processes that are measured from outside.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// A process that listens. Dropping it kills the process.
pub(crate) struct Process {
    child: Child,
    pub(crate) address: SocketAddr,
}

impl Process {
    /// Starts the gateway's binary and waits until it logs its address. With `alone` it runs on
    /// the first processor.
    pub(crate) fn start(args: &[&str], environment: &[(&str, String)], alone: bool) -> Self {
        let binary = env!("CARGO_BIN_EXE_threadkeeper");
        let mut command = if alone {
            Command::new("taskset")
        } else {
            Command::new(binary)
        };
        if alone {
            command.args(["-c", "0", binary]);
        }
        command
            .args(args)
            .envs(environment.iter().map(|(name, value)| (name, value)));
        let mut child = command
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut seen = Vec::new();
        let address = lines.by_ref().map_while(Result::ok).find_map(|line| {
            let address = line
                .contains("listening")
                .then(|| address_in(&line))
                .flatten();
            seen.push(line);
            address
        });
        let Some(address) = address else {
            panic!("the process did not start:\n{}", seen.join("\n"))
        };
        // The process must not block on a full pipe.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        Self { child, address }
    }

    /// Returns the processor time that the process has used.
    pub(crate) fn cpu(&self) -> Duration {
        cpu_of(&self.child.id().to_string())
    }

    /// Returns the resident memory in KiB. Memory that is shared with other processes counts in
    /// part.
    pub(crate) fn memory(&self) -> f64 {
        let text =
            std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.child.id())).unwrap();
        let pss = text
            .lines()
            .find_map(|line| line.strip_prefix("Pss:")?.trim().strip_suffix(" kB"));
        pss.unwrap().parse().unwrap()
    }
}

/// Returns the processor time that a process has used; zero if the process is gone.
pub(crate) fn cpu_of(pid: &str) -> Duration {
    // The kernel's own count of the time on a processor, in nanoseconds, for each thread.
    let threads = std::fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten();
    let nanos = threads.filter_map(|thread| {
        let text = std::fs::read_to_string(thread.ok()?.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(nanos.sum())
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn address_in(line: &str) -> Option<SocketAddr> {
    let from = line.find("127.0.0.1:")?;
    line[from..]
        .split(|c: char| !c.is_ascii_digit() && c != '.' && c != ':')
        .next()?
        .parse()
        .ok()
}

/// Moves this process, and the processes that it starts, to all processors but the first.
pub(crate) fn leave_the_first_processor() {
    let last = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap();
    let last = last.trim().rsplit(['-', ',']).next().unwrap();
    stay_on(&format!("1-{last}"));
}

/// Moves this process, and the processes that it starts from now on, to these processors.
pub(crate) fn stay_on(processors: &str) {
    let own = std::process::id().to_string();
    let moved = Command::new("taskset")
        .args(["-acp", processors, &own])
        .stdout(Stdio::null())
        .status();
    assert!(
        moved.is_ok_and(|status| status.success()),
        "processors cannot be chosen on this machine: try --share"
    );
}

/// Raises this process's limit of open files, and that of processes that it starts from now on,
/// to the highest value that the system allows.
pub(crate) fn raise_open_files() {
    let [_, most] = limits_of_open_files();
    let own = std::process::id().to_string();
    // Without `prlimit` the present limit stays.
    drop(
        Command::new("prlimit")
            .args(["--pid", &own, &format!("--nofile={most}:{most}")])
            .output(),
    );
}

/// Returns how many files this process and the processes that it starts may open.
pub(crate) fn open_files() -> usize {
    let [now, _] = limits_of_open_files();
    now
}

/// Returns the present limit, and the highest one that can be set.
fn limits_of_open_files() -> [usize; 2] {
    let text = std::fs::read_to_string("/proc/self/limits").unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))
        .unwrap();
    let mut limits = line
        .split_whitespace()
        .map_while(|limit| limit.parse().ok());
    [limits.next().unwrap(), limits.next().unwrap()]
}
