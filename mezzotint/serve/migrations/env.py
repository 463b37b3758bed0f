"""Where Alembic finds the connection: it is handed over by the store."""

from alembic import context

from mezzotint.serve.tables import Table

context.configure(connection=context.config.attributes["connection"], target_metadata=Table.metadata)
with context.begin_transaction():
    context.run_migrations()
