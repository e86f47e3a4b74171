//! nginx as a plain reverse proxy.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Longest time that the start may take.
const STARTUP: Duration = Duration::from_secs(10);

/// One process, since a killed master leaves its workers behind. Connections stay open on both
/// sides, nothing is logged, and bytes are not buffered.
const CONFIG: &str = "
daemon off;
master_process off;
worker_processes 1;
pid nginx.pid;
error_log stderr crit;
events { worker_connections 8192; }
http {
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    keepalive_requests 1000000000;
    upstream gateway {
        server GATEWAY;
        keepalive 1024;
        keepalive_requests 1000000000;
    }
    server {
        listen LISTEN;
        location / {
            proxy_pass http://gateway;
            proxy_http_version 1.1;
            proxy_set_header Connection '';
            proxy_buffering off;
        }
    }
}
";

/// A proxy in front of the gateway. Dropping it kills the process.
pub(crate) struct Nginx {
    child: Child,
    pub(crate) address: SocketAddr,
    _folder: tempfile::TempDir,
}

/// Returns the path of nginx, if it is installed.
pub(crate) fn binary() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Debian installs it in a folder that is not on every PATH.
    let folders = std::env::split_paths(&path).chain([PathBuf::from("/usr/sbin")]);
    folders
        .map(|folder| folder.join("nginx"))
        .find(|file| file.is_file())
}

impl Nginx {
    /// Starts the proxy and waits until it accepts connections.
    pub(crate) fn start(binary: &Path, gateway: SocketAddr) -> Self {
        // nginx cannot report a port that the system chose, so it gets one that was free a moment
        // ago.
        let address = TcpListener::bind("127.0.0.1:0")
            .and_then(|free| free.local_addr())
            .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let config = CONFIG
            .replace("GATEWAY", &gateway.to_string())
            .replace("LISTEN", &address.to_string());
        let file = folder.path().join("nginx.conf");
        std::fs::write(&file, config).unwrap();
        let mut command = Command::new(binary);
        command
            .arg("-p")
            .arg(folder.path())
            .arg("-c")
            .arg(&file)
            .args(["-e", "stderr"]);
        let mut nginx = Self {
            child: command.stdin(Stdio::null()).spawn().unwrap(),
            address,
            _folder: folder,
        };
        let begun = Instant::now();
        while TcpStream::connect(address).is_err() {
            let ended = nginx.child.try_wait().unwrap();
            assert!(
                ended.is_none() && begun.elapsed() < STARTUP,
                "nginx did not start"
            );
            sleep(Duration::from_millis(10));
        }
        nginx
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
