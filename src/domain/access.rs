//! The caller of a request and the caller's access level.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::run::text_enum;
use super::{TenantKey, UserKey};

text_enum!(
    /// What a caller may do. Each level includes the levels before it.
    #[derive(Ord, PartialOrd)]
    Access {
        /// Read the tenant's conversations.
        Read = "read",
        /// Post messages; steer and delete conversations.
        Chat = "chat",
        /// List all threads of the tenant.
        Admin = "admin",
        /// Start background work, which concerns all tenants.
        Operator = "operator",
    }
);

/// The authenticated caller of a request.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Principal {
    pub tenant: TenantKey,
    pub access: Access,
    /// The only user whose conversations the caller may use; `None`: all users of the tenant.
    pub user: Option<UserKey>,
    /// A name for logs and rate limits; not a secret.
    pub name: String,
}

/// Who reads a transcript.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Reader {
    /// A backend or an operator, who reads everything.
    Backend,
    /// A user with a token of their own. Outputs of tools are not for them: a backend or the
    /// upstream made them for the model.
    EndUser,
}

impl Principal {
    /// Returns as whom the caller reads transcripts.
    pub fn reader(&self) -> Reader {
        if self.user.is_some() {
            Reader::EndUser
        } else {
            Reader::Backend
        }
    }

    /// The caller where the configuration asks for no authentication.
    pub fn anybody() -> Self {
        Self {
            tenant: TenantKey::default(),
            access: Access::Operator,
            user: None,
            name: "anybody".to_owned(),
        }
    }
}
