"""The directive ``registered``: autodoc of what the plugin puts into mmengine's registries.

So a new hook is in the documentation as soon as a config can name it.
"""

import inspect

from docutils import nodes
from docutils.statemachine import StringList
from mmengine import registry
from sphinx.util.docutils import SphinxDirective

import ssn_plugin


def documented(registry_name: str) -> list[tuple[str, str]]:
    """Directive and full name of each registered object that ``ssn_plugin`` itself does not offer.

    Args:
        registry_name: Of mmengine's root registries, 'HOOKS' for one.
    """
    offered = {id(getattr(ssn_plugin, name)) for name in ssn_plugin.__all__}
    found = []
    for value in getattr(registry, registry_name).module_dict.values():
        if value.__module__.split('.')[0] == 'ssn_plugin' and id(value) not in offered:
            kind = 'autoclass' if inspect.isclass(value) else 'autofunction'
            found.append((kind, f'{value.__module__}.{value.__qualname__}'))
    return sorted(found, key=lambda entry: entry[1].rsplit('.', 1)[-1])


class RegisteredDirective(SphinxDirective):
    """``.. registered:: HOOKS``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        lines = StringList()
        for kind, name in documented(self.arguments[0]):
            lines.append(f'.. {kind}:: {name}', self.get_location())
            lines.append('', self.get_location())
        return self.parse_content_to_nodes() if not lines else self.parse_text_to_nodes(lines)


def setup(app) -> dict:
    """Add the directive.

    Args:
        app: Sphinx.
    """
    app.add_directive('registered', RegisteredDirective)
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
