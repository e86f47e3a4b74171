//! Maps a method and path to an operation.

use http::Method;

macro_rules! operations {
    ($($name:ident = $text:literal),+ $(,)?) => {
        /// An operation of either protocol.
        #[derive(Clone, Copy, Debug, Eq, PartialEq)]
        pub(in crate::simulator) enum Operation { $($name),+ }

        impl Operation {
            /// Returns the name for statistics and faults.
            pub(in crate::simulator) const fn name(self) -> &'static str {
                match self { $(Self::$name => $text),+ }
            }

            /// Returns true if an operation has this name.
            pub(in crate::simulator) fn exists(name: &str) -> bool {
                [$($text),+].contains(&name)
            }
        }
    };
}

operations! {
    ListModels = "list_models",
    CreateThread = "create_thread",
    ListThreads = "list_threads",
    GetThread = "get_thread",
    ModifyThread = "modify_thread",
    DeleteThread = "delete_thread",
    CreateMessage = "create_message",
    ListMessages = "list_messages",
    GetMessage = "get_message",
    ModifyMessage = "modify_message",
    DeleteMessage = "delete_message",
    CreateRun = "create_run",
    CreateThreadAndRun = "create_thread_and_run",
    ListRuns = "list_runs",
    GetRun = "get_run",
    ModifyRun = "modify_run",
    CancelRun = "cancel_run",
    SubmitToolOutputs = "submit_tool_outputs",
    ListSteps = "list_steps",
    GetStep = "get_step",
    CreateConversation = "create_conversation",
    ListConversations = "list_conversations",
    GetConversation = "get_conversation",
    UpdateConversation = "update_conversation",
    DeleteConversation = "delete_conversation",
    CreateItems = "create_items",
    ListItems = "list_items",
    GetItem = "get_item",
    DeleteItem = "delete_item",
    CreateResponse = "create_response",
    GetResponse = "get_response",
    DeleteResponse = "delete_response",
    CancelResponse = "cancel_response",
    ListInputItems = "list_input_items",
}

impl Operation {
    /// Returns the operation at a path below the base, if there is one.
    pub(in crate::simulator) fn of(method: &Method, path: &[&str]) -> Option<Self> {
        let (get, post, delete) = (
            method == Method::GET,
            method == Method::POST,
            method == Method::DELETE,
        );
        let by_verb = |on_get: Self, on_post: Self, on_delete: Self| match () {
            () if get => Some(on_get),
            () if post => Some(on_post),
            () if delete => Some(on_delete),
            () => None,
        };
        match path {
            ["models"] if get => Some(Self::ListModels),
            ["threads"] if post => Some(Self::CreateThread),
            ["threads"] if get => Some(Self::ListThreads),
            ["threads", "runs"] if post => Some(Self::CreateThreadAndRun),
            ["threads", _] => by_verb(Self::GetThread, Self::ModifyThread, Self::DeleteThread),
            ["threads", _, "messages"] if post => Some(Self::CreateMessage),
            ["threads", _, "messages"] if get => Some(Self::ListMessages),
            ["threads", _, "messages", _] => {
                by_verb(Self::GetMessage, Self::ModifyMessage, Self::DeleteMessage)
            }
            ["threads", _, "runs"] if post => Some(Self::CreateRun),
            ["threads", _, "runs"] if get => Some(Self::ListRuns),
            ["threads", _, "runs", _] if get => Some(Self::GetRun),
            ["threads", _, "runs", _] if post => Some(Self::ModifyRun),
            ["threads", _, "runs", _, "cancel"] if post => Some(Self::CancelRun),
            ["threads", _, "runs", _, "submit_tool_outputs"] if post => {
                Some(Self::SubmitToolOutputs)
            }
            ["threads", _, "runs", _, "steps"] if get => Some(Self::ListSteps),
            ["threads", _, "runs", _, "steps", _] if get => Some(Self::GetStep),
            ["conversations"] if post => Some(Self::CreateConversation),
            ["conversations"] if get => Some(Self::ListConversations),
            ["conversations", _] => by_verb(
                Self::GetConversation,
                Self::UpdateConversation,
                Self::DeleteConversation,
            ),
            ["conversations", _, "items"] if post => Some(Self::CreateItems),
            ["conversations", _, "items"] if get => Some(Self::ListItems),
            ["conversations", _, "items", _] if get => Some(Self::GetItem),
            ["conversations", _, "items", _] if delete => Some(Self::DeleteItem),
            ["responses"] if post => Some(Self::CreateResponse),
            ["responses", _] if get => Some(Self::GetResponse),
            ["responses", _] if delete => Some(Self::DeleteResponse),
            ["responses", _, "cancel"] if post => Some(Self::CancelResponse),
            ["responses", _, "input_items"] if get => Some(Self::ListInputItems),
            _ => None,
        }
    }

    /// Returns true if the operation makes a model work, so that all directives apply.
    pub(in crate::simulator) const fn generates(self) -> bool {
        self.starts() || matches!(self, Self::SubmitToolOutputs)
    }

    /// Returns true if the operation starts a run or a response.
    const fn starts(self) -> bool {
        matches!(
            self,
            Self::CreateRun | Self::CreateThreadAndRun | Self::CreateResponse
        )
    }

    /// Returns true if a fault on `name` applies to the operation. Beside the operation's own
    /// name there are `any`, `start` (any operation that starts a run) and `create_thread` (of
    /// either protocol).
    pub(in crate::simulator) fn answers_to(self, name: &str) -> bool {
        match name {
            "any" => true,
            "start" => self.starts(),
            "create_thread" => matches!(self, Self::CreateThread | Self::CreateConversation),
            name => name == self.name(),
        }
    }
}
