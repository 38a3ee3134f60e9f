"""The HTTP server: OpenAI's API over the generation engine, and a page."""
