//! Why a token proves nothing, and why tokens cannot be verified at all.

/// Why a token proves nothing.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum JwtRefusal {
    /// The token proves nothing, now or later. The text gives the caller the reason in fixed words, without
    /// any part of the token.
    #[error("the token is refused: {0}")]
    Invalid(&'static str),
    /// The gateway has no keys of the issuer at present, so the token may be good.
    #[error("the gateway cannot fetch the keys of the token issuer at present")]
    Unavailable,
}

/// Why tokens cannot be verified with this configuration.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum JwtSetupError {
    #[error(
        "auth.jwt: exactly one source of keys is needed: set jwks_url, public_key_file or secret"
    )]
    Source,
    #[error("auth.jwt: {0} does not work with a secret: use HS256, or a public key")]
    Secret(&'static str),
    #[error("auth.jwt: the public key does not fit {0}, or is too short")]
    PublicKey(&'static str),
    #[error(
        "auth.jwt: this machine has no CA certificates, so the gateway cannot verify the server of jwks_url: \
         install the package `ca-certificates`, or let SSL_CERT_FILE name a file of certificates in PEM \
         form"
    )]
    NoRootCertificates,
    #[error("auth.jwt: the HTTP client cannot be built")]
    Client,
}
