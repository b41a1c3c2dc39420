; A softmax that reduces twice through the same LDS slots.
; The second reduction writes slot 0 while other waves may still read the maximum from it: a barrier is missing
; where the line is marked. Lockstep waves give the right numbers; a wave that runs ahead spoils the others.
	.amdgcn_target "amdgcn-amd-amdhsa--gfx950"
	.type	softmax_reduce,@function
softmax_reduce:                                  ; arguments: input, output (f32 or dwords)
	s_load_dwordx4 s[4:7], s[0:1], 0x0
	v_lshlrev_b32_e32 v1, 2, v0            ; v1 = 4 * work-item
	v_lshrrev_b32_e32 v2, 6, v0            ; v2 = wave
	v_and_b32_e32 v3, 63, v0               ; v3 = lane
	s_waitcnt lgkmcnt(0)
	global_load_dword v4, v1, s[4:5]
	s_waitcnt vmcnt(0)
	; each wave's lane 0 writes its value to slot [wave]
	v_cmp_eq_u32_e32 vcc, 0, v3
	s_and_saveexec_b64 s[10:11], vcc
	v_lshlrev_b32_e32 v5, 2, v2
	ds_write_b32 v5, v4
	s_mov_b64 exec, s[10:11]
	s_waitcnt lgkmcnt(0)
	s_barrier
	; wave 0 combines the four slots into slot 0
	v_cmp_eq_u32_e32 vcc, 0, v0
	s_and_saveexec_b64 s[10:11], vcc
	v_mov_b32_e32 v6, 0
	ds_read_b128 v[8:11], v6
	s_waitcnt lgkmcnt(0)
	v_max_f32_e32 v8, v8, v9
	v_max_f32_e32 v10, v10, v11
	v_max_f32_e32 v8, v8, v10
	ds_write_b32 v6, v8
	s_mov_b64 exec, s[10:11]
	s_waitcnt lgkmcnt(0)
	s_barrier
	v_mov_b32_e32 v6, 0
	ds_read_b32 v12, v6
	s_waitcnt lgkmcnt(0)
	; s_barrier                            ; FIX: nobody may write a slot before everybody has read the maximum
	v_sub_f32_e32 v13, v4, v12
	v_exp_f32_e32 v13, v13
	s_nop 0
	; each wave's lane 0 writes its value to slot [wave]
	v_cmp_eq_u32_e32 vcc, 0, v3
	s_and_saveexec_b64 s[10:11], vcc
	v_lshlrev_b32_e32 v5, 2, v2
	ds_write_b32 v5, v13
	s_mov_b64 exec, s[10:11]
	s_waitcnt lgkmcnt(0)
	s_barrier
	; wave 0 combines the four slots into slot 0
	v_cmp_eq_u32_e32 vcc, 0, v0
	s_and_saveexec_b64 s[10:11], vcc
	v_mov_b32_e32 v6, 0
	ds_read_b128 v[8:11], v6
	s_waitcnt lgkmcnt(0)
	v_add_f32_e32 v8, v8, v9
	v_add_f32_e32 v10, v10, v11
	v_add_f32_e32 v8, v8, v10
	ds_write_b32 v6, v8
	s_mov_b64 exec, s[10:11]
	s_waitcnt lgkmcnt(0)
	s_barrier
	v_mov_b32_e32 v6, 0
	ds_read_b32 v14, v6
	s_waitcnt lgkmcnt(0)
	v_rcp_f32_e32 v14, v14
	s_nop 0
	v_mul_f32_e32 v13, v13, v14
	global_store_dword v1, v13, s[6:7]
	s_endpgm
.Lfunc_end0:
	.amdhsa_kernel softmax_reduce
		.amdhsa_group_segment_fixed_size 16
		.amdhsa_kernarg_size 16
		.amdhsa_user_sgpr_kernarg_segment_ptr 1
		.amdhsa_user_sgpr_count 2
		.amdhsa_next_free_vgpr 32
		.amdhsa_next_free_sgpr 32
		.amdhsa_accum_offset 32
	.end_amdhsa_kernel
	.amdgpu_metadata
amdhsa.kernels:
  - .args:
      - .address_space:  global
        .name:           x
        .offset:         0
        .size:           8
        .value_kind:     global_buffer
      - .address_space:  global
        .name:           y
        .offset:         8
        .size:           8
        .value_kind:     global_buffer
    .group_segment_fixed_size: 16
    .kernarg_segment_size: 16
    .max_flat_workgroup_size: 256
    .name:           softmax_reduce
    .vgpr_count:     32
	.end_amdgpu_metadata
