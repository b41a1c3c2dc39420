; A prologue that starts three groups of four loads into LDS and waits for the first only.
; After vmcnt(8) the first group has landed; the second, which is read next, needs vmcnt(4). On hardware the
; result depends on latency. In hazard mode the second group is still the old contents of LDS.
	.amdgcn_target "amdgcn-amd-amdhsa--gfx950"
	.type	wait_count,@function
wait_count:                                  ; arguments: input, output (f32 or dwords)
	s_load_dwordx4 s[4:7], s[0:1], 0x0
	v_lshlrev_b32_e32 v1, 2, v0            ; v1 = 4 * work-item
	v_lshrrev_b32_e32 v2, 6, v0            ; v2 = wave
	v_and_b32_e32 v3, 63, v0               ; v3 = lane
	s_waitcnt lgkmcnt(0)
	s_mov_b32 s8, s4
	s_mov_b32 s9, s5
	s_mov_b32 s10, 3072
	s_mov_b32 s11, 0x27000
	s_mov_b32 m0, 0
	s_movk_i32 s12, 0x0
	buffer_load_dword v1, s[8:11], s12 offen lds
	s_mov_b32 m0, 256
	s_movk_i32 s12, 0x100
	buffer_load_dword v1, s[8:11], s12 offen lds
	s_mov_b32 m0, 512
	s_movk_i32 s12, 0x200
	buffer_load_dword v1, s[8:11], s12 offen lds
	s_mov_b32 m0, 768
	s_movk_i32 s12, 0x300
	buffer_load_dword v1, s[8:11], s12 offen lds
	s_mov_b32 m0, 1024
	s_movk_i32 s12, 0x400
	buffer_load_dword v1, s[8:11], s12 offen lds
	s_mov_b32 m0, 1280
	s_movk_i32 s12, 0x500
	buffer_load_dword v1, s[8:11], s12 offen lds
	s_mov_b32 m0, 1536
	s_movk_i32 s12, 0x600
	buffer_load_dword v1, s[8:11], s12 offen lds
	s_mov_b32 m0, 1792
	s_movk_i32 s12, 0x700
	buffer_load_dword v1, s[8:11], s12 offen lds
	s_mov_b32 m0, 2048
	s_movk_i32 s12, 0x800
	buffer_load_dword v1, s[8:11], s12 offen lds
	s_mov_b32 m0, 2304
	s_movk_i32 s12, 0x900
	buffer_load_dword v1, s[8:11], s12 offen lds
	s_mov_b32 m0, 2560
	s_movk_i32 s12, 0xa00
	buffer_load_dword v1, s[8:11], s12 offen lds
	s_mov_b32 m0, 2816
	s_movk_i32 s12, 0xb00
	buffer_load_dword v1, s[8:11], s12 offen lds
	s_waitcnt vmcnt(8)                     ; FIX: s_waitcnt vmcnt(4)
	s_barrier
	ds_read_b32 v4, v1
	ds_read_b32 v5, v1 offset:1024
	s_waitcnt lgkmcnt(0)
	v_add_u32_e32 v4, v4, v5
	global_store_dword v1, v4, s[6:7]
	s_endpgm
.Lfunc_end0:
	.amdhsa_kernel wait_count
		.amdhsa_group_segment_fixed_size 3072
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
    .group_segment_fixed_size: 3072
    .kernarg_segment_size: 16
    .max_flat_workgroup_size: 256
    .name:           wait_count
    .vgpr_count:     32
	.end_amdgpu_metadata
