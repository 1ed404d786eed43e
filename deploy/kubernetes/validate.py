"""Everything that can be known of manifests without a cluster, as sentences with line numbers."""

from pathlib import Path

from deploy.kubernetes.agreement import disagreements
from deploy.kubernetes.consistency import inconsistent
from deploy.kubernetes.documents import Problem, read_documents
from deploy.kubernetes.kuberay import refused
from deploy.kubernetes.schemas import Schemas
from deploy.kubernetes.workloads import pods


def validate(text: str, definitions: Path | None = None) -> tuple[int, list[Problem]]:
    """How many documents there are, and what is wrong with them, in the order of the lines.

    `definitions`: a folder of CustomResourceDefinitions beside the ones that are built in. The rules beyond the
    schemas are applied only to documents that their schemas accept, so that they can rely on types.
    """
    documents, problems = read_documents(text)
    schemas = Schemas(definitions)
    by_schema = [problem for document in documents for problem in schemas.problems(document)]
    problems += by_schema
    if not by_schema:
        found = pods(documents)
        for document in documents:
            if document.kind == "RayService":
                problems += refused(document)
                problems += disagreements(document, documents, found)
        problems += inconsistent(documents, found)
    return len(documents), sorted(set(problems))
