//! The health check of the container: calls `/healthz` of the gateway on this machine.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, bail};

const TIMEOUT: Duration = Duration::from_secs(2);

/// Calls `/healthz` of the gateway that listens on `listen`. Blocks for a few seconds at most.
pub fn check(listen: SocketAddr) -> anyhow::Result<()> {
    let address = reachable(listen);
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)
        .with_context(|| format!("no gateway listens on {address}"))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
    let mut head = [0; 12];
    stream
        .read_exact(&mut head)
        .context("the gateway did not answer in time")?;
    if &head != b"HTTP/1.1 200" {
        bail!("the gateway answered `{}`", String::from_utf8_lossy(&head));
    }
    Ok(())
}

/// Returns an address at which a listen address can be reached: loopback, if it listens on all interfaces.
pub fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}
