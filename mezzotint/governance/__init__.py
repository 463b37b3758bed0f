"""What may be drawn and how it is marked, signed and traced: filters, watermark, credentials, lineage, audit."""
