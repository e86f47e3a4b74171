//! IP networks.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;

/// An IP network such as `10.0.0.0/8`, or a single address.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(try_from = "String")]
pub struct Network(IpNet);

/// The text is not a network.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("expected an IP network such as \"10.0.0.0/8\" or an address such as \"::1\"")]
pub struct InvalidNetwork;

impl Network {
    /// Returns whether the network contains the address, which must be in its
    /// [canonical](IpAddr::to_canonical) form.
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
