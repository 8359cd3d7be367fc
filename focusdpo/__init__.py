"""FocusDPO: Diffusion-DPO that looks where subjects are not yet aligned, then at detail (arXiv 2509.01181)."""

from focusdpo.loss import FocusDPOOutput, convert_beta, focus_dpo_loss
from focusdpo.mask import FocusMask, focus_mask

__all__ = ["FocusDPOOutput", "FocusMask", "convert_beta", "focus_dpo_loss", "focus_mask"]
__version__ = "0.1.0"
