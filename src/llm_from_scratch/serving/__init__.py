"""The HTTP server: OpenAI's API for the generation engine, and the playground."""
