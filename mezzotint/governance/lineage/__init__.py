"""Where a model comes from, in the formats that auditors read, written beside it by the training itself.

model/lineage/ holds: dataset.json (every training file with its SHA-256), attestation.json (in-toto statement with SLSA
provenance, signed), model.sig (OpenSSF model signature), mlbom.cdx.json (CycloneDX ML bill of materials),
openlineage.ndjson (events of the run), atlas.json (entities for Apache Atlas, which Purview takes), and the
certificates to check them with. An OpenLineage server and an MLflow store are told of the run where they are named.
"""

from mezzotint.governance.lineage import events, registry
from mezzotint.governance.lineage.folder import checked, written
from mezzotint.governance.lineage.trained import FOLDER, Trained

__all__ = ["FOLDER", "Trained", "checked", "events", "registry", "written"]
