//! IP networks.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;

/// An IP network such as `10.0.0.0/8`, or a single address.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(try_from = "String")]
pub struct Network(IpNet);

/// The text is no network.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("expected an IP network such as \"10.0.0.0/8\" or an address such as \"::1\"")]
pub struct InvalidNetwork;

impl Network {
    /// Of an IPv4 address that is written as an IPv6 one the caller passes the [canonical](IpAddr::to_canonical) form.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address)
    }
}

impl TryFrom<String> for Network {
    type Error = InvalidNetwork;

    fn try_from(text: String) -> Result<Self, InvalidNetwork> {
        let address = || text.parse::<IpAddr>().map(IpNet::from);
        text.parse()
            .or_else(|_| address())
            .map(Self)
            .map_err(|_| InvalidNetwork)
    }
}
