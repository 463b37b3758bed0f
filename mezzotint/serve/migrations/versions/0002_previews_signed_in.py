"""Previews of jobs that are drawn; browsers that are signed in."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0002", "0001"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("previewed", sa.Integer, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("preview", sa.LargeBinary))
    op.create_table(
        "signed_in",
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("key", sa.String(32), sa.ForeignKey("keys.id", ondelete="CASCADE"), nullable=False),
        sa.Column("until", sa.Double, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("signed_in")
    op.drop_column("jobs", "preview")
    op.drop_column("jobs", "previewed")
