//! The gateway's routes in memory, without a process or a socket. They suit checks that a handler
//! makes before it starts any work.

use axum::Router;
use axum::body::{Body, to_bytes};
use http::Request;
use reqwest::{Method, RequestBuilder};
use serde_json::Value;
use threadkeeper::app::App;
use threadkeeper::config::{Config, ConfigFile, Sources};
use tower::ServiceExt;

use super::contract;
use super::gateway::Answer;
use super::scene::Scene;

/// Longest answer that is read, in bytes.
const MAX_ANSWER: usize = 16 * 1024 * 1024;

pub(crate) struct Routes {
    router: Router,
    client: reqwest::Client,
    _app: App,
}

impl Routes {
    /// Builds the routes of a gateway with the scene's configuration and further settings (TOML).
    pub(crate) async fn new(scene: &Scene, more: &str) -> Self {
        let file = ConfigFile::Text {
            name: "gateway.toml".to_owned(),
            text: scene.config(more),
        };
        let listen = "127.0.0.1:0".parse().ok();
        let sources = Sources {
            file: Some(file),
            listen,
            ..Sources::default()
        };
        let app = App::build(Config::load_for_serve(sources).unwrap())
            .await
            .unwrap();
        Self {
            router: app.router(),
            client: reqwest::Client::new(),
            _app: app,
        }
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("http://gateway{path}"))
    }

    pub(crate) async fn send(&self, request: RequestBuilder) -> Answer {
        let request = request.build().unwrap();
        let (method, path) = (request.method().clone(), request.url().path().to_owned());
        let request = Request::<reqwest::Body>::try_from(request)
            .unwrap()
            .map(Body::new);
        let Ok(response) = self.router.clone().oneshot(request).await;
        let (head, body) = response.into_parts();
        let text = String::from_utf8(to_bytes(body, MAX_ANSWER).await.unwrap().into()).unwrap();
        contract::check(&method, &path, head.status, &head.headers, &text);
        let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
        Answer {
            status: head.status,
            headers: head.headers,
            body,
        }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(self.request(Method::GET, path)).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(self.request(Method::POST, path).json(body)).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Answer {
        self.send(self.request(Method::DELETE, path)).await
    }
}
