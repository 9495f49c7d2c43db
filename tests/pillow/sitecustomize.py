# SPDX-License-Identifier: Apache-2.0
"""With this folder in ``PYTHONPATH``, models that see are given images by Pillow where torchvision is missing.

transformers prepares images with either, but loads no processor of images without torchvision, whose CPU build no
package index has. To be imported by name as well, before engines start.
"""

import sys
from importlib.util import find_spec

from transformers.utils import import_utils

if find_spec("torchvision") is None:
    import_utils.BACKENDS_MAPPING["torchvision"] = (lambda: True, "")
    # What has been imported before keeps a placeholder for it.
    for module in list(sys.modules.values()):
        if isinstance(module, import_utils._LazyModule):
            module._object_missing_backend.pop("AutoImageProcessor", None)
            vars(module).pop("AutoImageProcessor", None)
