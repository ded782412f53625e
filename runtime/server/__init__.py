"""An HTTP server for bundles: OpenAI's API, the Open Inference Protocol, metrics and a chat page."""
